"""Runs that cannot begin: settings, data or a model that cannot be used."""

from pathlib import Path
from typing import Any

import pytest

from em_train.prompts import InputError
from em_train.run import run
from tests.em_train.support import ft, rl


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (ft, {"model": "no/where", "fresh_every": 1}, "--model: got 'no/where'; no model that transformers loads"),
        (ft, {"max_tokens": 1020, "fresh_every": 1}, "--max-tokens: got 1020; at most"),
        (ft, {"held_out": "bare.jsonl", "fresh_every": 1}, "has a row without `answer`"),
        (ft, {"outputs": "bare.jsonl", "prompts": None}, "line 1: has no `prompt` and `output`"),
        (ft, {"outputs": "empty.jsonl", "prompts": None}, "has no rows"),
        (rl, {"prompts": "bare.jsonl", "reward": "correct"}, "--reward: got 'correct'; a prompt has no `answer`"),
        (rl, {"vllm": "on"}, "--vllm: got 'on'; it needs CUDA"),
        (ft, {"entropy_floor": 1, "fresh_every": 1}, "the untrained model would be stopped at once: entropy 0.0"),
        (rl, {"resume": True}, "holds no run to go on with"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(
    kind: Any, given: dict[str, Any], expected: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("bare.jsonl").write_text('{"prompt": "1+1"}\n')
    Path("empty.jsonl").write_text("")
    with pytest.raises(InputError) as caught:
        run(kind(**{"prompts": str(prompts), "out": "o"} | given))
    assert expected in str(caught.value)
    assert not list(Path().glob("o/*.safetensors"))


@pytest.mark.parametrize(
    ("kind", "given", "flag"),
    [(ft, {"kl_weight": 1, "fresh_every": 1}, "--kl-weight: got 1.0"), (rl, {}, "--beta: got 0.001")],
)
def test_a_base_model_that_one_process_alone_would_read_is_refused(
    kind: Any, given: dict[str, Any], flag: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(InputError, match=f"{flag}; needs `fsdp_cpu_ram_efficient_loading: false`"):
        run(kind(prompts=str(prompts), out=tmp_path / "o", **given))
    assert not (tmp_path / "o").exists()
