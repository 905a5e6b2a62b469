"""What em-serve chooses on a CPU if the user has not, and what it refuses."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server import cpu_defaults
from server.cpu_defaults import GIB, choose
from server.model_files import ModelFiles, StartError

AVX2, AVX512 = "flags : fma avx2 bmi2", "flags : fma avx2 avx512f avx512_bf16"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set a machine that has all that a model needs."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(cpu_defaults, "PROCESSOR", tmp_path / "cpuinfo")
    processor(AVX512)
    memory(monkeypatch, free=32 * GIB)


def processor(flags: str) -> None:
    cpu_defaults.PROCESSOR.write_text(flags)


def memory(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    node = SimpleNamespace(total_memory=32 * GIB, available_memory=int(free))
    monkeypatch.setattr(cpu_defaults, "_memory", lambda: node)


def chosen(model: ModelFiles | None = None, **flags: Any) -> Namespace:
    defaults: dict[str, Any] = {
        "enable_chunked_prefill": None,
        "max_num_batched_tokens": None,
        "max_model_len": None,
        "dtype": "auto",
        "tensor_parallel_size": 1,
        "kv_cache_memory_bytes": None,
        "gpu_memory_utilization": 0.92,
    }
    args = Namespace(**defaults | flags)
    choose(args, model or ModelFiles())
    return args


def model(context: int = 1024, dtype: str = "bfloat16", weights: float | None = GIB) -> ModelFiles:
    size = None if weights is None else int(weights)
    return ModelFiles({"max_position_embeddings": context, "dtype": dtype}, size)


# ---- Steps and the context


@pytest.mark.parametrize(
    ("flags", "chunks"),
    [
        ({}, False),
        ({"enable_chunked_prefill": True}, True),
        ({"enable_chunked_prefill": False}, False),
        ({"max_num_batched_tokens": 64}, None),
    ],
)
def test_chunked_prefill_is_off_unless_it_is_asked_for(flags: dict[str, Any], chunks: bool | None) -> None:
    assert chosen(**flags).enable_chunked_prefill is chunks


@pytest.mark.parametrize(("context", "limit"), [(32_768, 4096), (4097, 4096), (4096, None), (1024, None)])
def test_a_long_context_is_limited(context: int, limit: int | None) -> None:
    assert chosen(model(context)).max_model_len == limit


@pytest.mark.parametrize(
    ("flags", "limit"),
    [
        ({"max_model_len": 8192}, 8192),
        ({"enable_chunked_prefill": True}, None),
        ({"max_num_batched_tokens": 64}, None),
    ],
)
def test_a_context_is_not_limited_if_the_user_chose_it_or_its_steps(flags: dict[str, Any], limit: int | None) -> None:
    assert chosen(model(32_768), **flags).max_model_len == limit


def test_steps_and_context_are_left_alone_on_the_v2_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    args = chosen(model(32_768))
    assert (args.enable_chunked_prefill, args.max_model_len) == (None, None)


# ---- The type of the weights


def test_bfloat16_becomes_float32_on_a_processor_without_its_kernels(caplog: pytest.LogCaptureFixture) -> None:
    assert chosen(model()).dtype == "auto"
    processor(AVX2)
    with caplog.at_level("INFO", "vllm.em_inf"):
        assert chosen(model()).dtype == "float32"
    assert "--dtype bfloat16 chooses it" in caplog.text


@pytest.mark.parametrize(
    "kept",
    [
        {"model": model(dtype="float16")},
        {"model": model(weights=None)},  # of unknown size: they might not fit
        {"model": model(weights=4 * 2**20)},  # the demo model's
        {"model": model(), "dtype": "bfloat16"},
        {"model": model(weights=20 * GIB)},  # float32 would not fit
        {"model": ModelFiles({"dtype": "bfloat16", "quantization_config": {}}, GIB)},
    ],
)
def test_the_type_is_kept(kept: dict[str, Any]) -> None:
    processor(AVX2)
    assert chosen(**kept).dtype == kept.get("dtype", "auto")


@pytest.mark.parametrize("flags", ["Features : fp asimd bf16", "flags : sse2"])
def test_the_type_is_kept_on_processors_that_we_do_not_know(flags: str) -> None:
    processor(flags)
    assert chosen(model()).dtype == "auto"
    cpu_defaults.PROCESSOR.unlink()
    assert chosen(model()).dtype == "auto"


# ---- Memory


def test_the_kv_cache_gets_what_is_left_if_less_is_free_than_vllm_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(model()).kv_cache_memory_bytes is None
    memory(monkeypatch, free=5 * GIB)
    assert chosen(model()).kv_cache_memory_bytes == 2 * GIB
    memory(monkeypatch, free=20 * GIB)
    assert chosen(model()).kv_cache_memory_bytes == 4 * GIB
    assert chosen(model(weights=None)).kv_cache_memory_bytes == 4 * GIB


def test_float32_weights_are_counted_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(AVX2)
    memory(monkeypatch, free=5 * GIB)
    assert chosen(model()).kv_cache_memory_bytes == 1.5 * GIB
    assert chosen(model(), tensor_parallel_size=2).kv_cache_memory_bytes == 2 * GIB


def test_the_users_choice_of_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, free=15 * GIB)
    problem = r"^15\.0 GiB of memory are free, and vLLM would take 28\.8 GiB .*KVCACHE_SPACE"
    with pytest.raises(StartError, match=problem):
        chosen(gpu_memory_utilization=0.9)
    assert chosen(gpu_memory_utilization=0.4).kv_cache_memory_bytes is None
    assert chosen(kv_cache_memory_bytes=GIB).kv_cache_memory_bytes == GIB
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert chosen(gpu_memory_utilization=0.9).kv_cache_memory_bytes is None


def test_too_little_memory_is_told_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, free=1.5 * GIB)
    with pytest.raises(StartError, match=r"^1\.5 GiB of memory are free, and vLLM would take 29\.4 GiB"):
        chosen(model())
    with pytest.raises(StartError, match=r"^model: its weights take 2\.0 GiB, and 1\.5 GiB of memory are free"):
        chosen(model(weights=2 * GIB))
