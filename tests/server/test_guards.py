"""What em-serve prevents before the start, and what it lowers in each API server."""

import os
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from em_sampler.vllm_plugin.processor import EMInfLogitsProcessor
from server import guards
from server.cpu_defaults import GIB
from server.guards import prepare
from server.model_files import ModelFiles, StartError

VARIABLES = ("TORCHDYNAMO_DISABLE", "VLLM_USE_AOT_COMPILE", "CXX")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a machine on which nothing has to be prevented."""
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that it is put back afterwards
        monkeypatch.delenv(variable)
    monkeypatch.setattr(guards.cpu_defaults, "choose", lambda args, model: None)  # test_cpu_defaults.py
    monkeypatch.setattr(guards, "read_model", lambda *model: ModelFiles())
    on_cpu(monkeypatch, True)
    shared_memory(monkeypatch, 10 * GIB)
    monkeypatch.setattr(guards.shutil, "which", lambda name: f"/usr/bin/{name}")


def on_cpu(monkeypatch: pytest.MonkeyPatch, is_cpu: bool) -> None:
    monkeypatch.setattr(guards, "current_platform", SimpleNamespace(is_cpu=lambda: is_cpu))


def shared_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(guards.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def prepared(**flags: Any) -> Namespace:
    defaults: dict[str, Any] = {
        "root_path": "",
        "api_server_count": None,
        "data_parallel_size": 1,
        "data_parallel_size_local": None,
        "pipeline_parallel_size": 1,
        "shutdown_timeout": 0,
        "model_tag": None,
        "model": "demo",
        "revision": None,
        "hf_token": None,
    }
    args = Namespace(**defaults | flags)
    prepare(args)
    return args


def test_nothing_is_compiled_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared()
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    monkeypatch.setattr(guards.shutil, "which", lambda name: None)
    prepared()
    assert (os.environ["TORCHDYNAMO_DISABLE"], os.environ["VLLM_USE_AOT_COMPILE"]) == ("1", "0")


def test_a_pipeline_is_refused_on_the_cpu() -> None:
    with pytest.raises(StartError, match="--pipeline-parallel-size: must be 1 on the CPU"):
        prepared(pipeline_parallel_size=2)


def test_too_little_shared_memory_is_told_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    shared_memory(monkeypatch, 200 * 2**20)
    prepared()
    with pytest.raises(StartError, match="has 200 MiB free; must be at least 320 MiB"):
        prepared(data_parallel_size=2)
    prepared(data_parallel_size=2, data_parallel_size_local=1)


@pytest.mark.parametrize(("given", "used"), [("/", ""), ("/llm/", "/llm"), ("/llm", "/llm"), (None, "")])
def test_a_root_path_does_not_end_in_a_slash(given: str | None, used: str) -> None:
    assert prepared(root_path=given).root_path == used


def test_several_api_servers_have_time_to_cut_off() -> None:
    assert prepared().shutdown_timeout == 0
    assert prepared(api_server_count=2).shutdown_timeout == prepared(data_parallel_size=2).shutdown_timeout == 5
    assert prepared(api_server_count=2, shutdown_timeout=60).shutdown_timeout == 60


def engine(chunks: bool = False, v2: bool = False, max_logprobs: int = 20) -> Any:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(enable_chunked_prefill=chunks),
        use_v2_model_runner=v2,
        model_config=SimpleNamespace(max_logprobs=max_logprobs, get_vocab_size=lambda: 32),
    )


def test_seeds_end_the_engine_with_chunks_on_the_cpus_v1_runner_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert guards.seeds_end_engine(engine(chunks=True))
    assert not guards.seeds_end_engine(engine(chunks=False))
    assert not guards.seeds_end_engine(engine(chunks=True, v2=True))
    on_cpu(monkeypatch, False)
    assert not guards.seeds_end_engine(engine(chunks=True))


def test_a_seed_is_refused_if_it_would_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    EMInfLogitsProcessor.validate_params(SamplingParams(seed=1))
    monkeypatch.setattr(EMInfLogitsProcessor, "seeds_end_engine", True)
    EMInfLogitsProcessor.validate_params(SamplingParams())
    with pytest.raises(VLLMValidationError, match="seed: got 0; must be left out") as caught:
        EMInfLogitsProcessor.validate_params(SamplingParams(seed=0))
    assert caught.value.parameter == "body.seed"


@pytest.mark.parametrize(("given", "used"), [(100, 32), (32, 32), (20, 20), (-1, -1)])
def test_max_logprobs_is_at_most_the_vocabulary(given: int, used: int) -> None:
    config = engine(max_logprobs=given)
    guards.limit_engine(config)
    assert config.model_config.max_logprobs == used
