"""A run as a whole: guards, checkpoints, kill -9 and resume, a full disk, and what cannot be done."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from em_train.data import drawn_order
from em_train.prompts import InputError
from em_train.run import run
from tests.em_train.support import SMALL, curve, ft, rl, trained, write_outputs, write_prompts

# Outputs are drawn in these, so that a wrong random state would show.
RUNS = {
    "ft": lambda prompts, **more: ft(prompts=str(prompts), fresh_every=1, steps=4, **more),
    "rl": lambda prompts, **more: rl(prompts=str(prompts), steps=4, **more),
    "lora": lambda prompts, **more: ft(prompts=str(prompts), fresh_every=2, steps=4, lora_rank=4, **more),
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", 32)


def weights(out: Path) -> bytes:
    [file] = out.glob("*model.safetensors")
    return file.read_bytes()


@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_interrupted(kind: str, prompts: Path, tmp_path: Path):
    """Interrupted between two checkpoints, while the second was being written."""
    whole = trained(RUNS[kind](prompts, out=tmp_path / "whole"))
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "whole", broken)
    for file in broken.glob("*.safetensors"):
        file.unlink()
    half = broken / "checkpoints" / "checkpoint-4"
    (half / "trainer_state.json").write_text('{"half": ')
    resumed = trained(RUNS[kind](prompts, out=broken, resume=True))
    assert weights(broken) == weights(tmp_path / "whole")
    assert [row for row in resumed["log"] if "loss" in row and row["step"] > 2]
    for name in ("loss", "eval_entropy", "eval_length"):
        assert curve(resumed, name) == curve(whole, name), name


def test_kill_9_in_the_middle_loses_nothing_that_was_saved(prompts: Path, tmp_path: Path):
    """A real process, killed when its first checkpoint is whole; what goes on ends as a run that was left alone."""
    settings = {"prompts": str(prompts), "fresh_every": 1, "steps": 8}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | settings).items()]
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "em_train.cli", "ft", *flags, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoints" / "checkpoint-2" / "trainer_state.json").is_file():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-2000:]
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not list(out.glob("*.safetensors")), "it had ended before"
    assert json.loads((out / "run.json").read_text())["ended"] is None
    with pytest.raises(InputError, match="holds a run already; --resume goes on with it"):
        run(ft(out=out, **settings))
    with pytest.raises(InputError, match=r"--learning-rate: got 0\.5; the run in .* has 0\.0001"):
        run(ft(out=out, resume=True, **settings | {"learning_rate": 0.5}))
    card = trained(ft(out=out, resume=True, **settings))
    assert card["ended"] == "all 8 steps were taken"
    trained(ft(out=tmp_path / "alone", **settings))
    assert weights(out) == weights(tmp_path / "alone")


def test_over_training_is_stopped_and_the_last_healthy_weights_are_kept(prompts: Path, tmp_path: Path):
    """At a rate far too high the outputs fall apart within a few steps."""
    settings = rl(prompts=str(prompts), out=tmp_path / "o", steps=60, learning_rate=3e-3, entropy_floor=0.02)
    card = trained(settings)
    assert "stopped at step" in card["ended"]
    checks = [row for row in card["log"] if "eval_keep" in row]
    assert checks[-1]["eval_keep"] == -1 and checks[-1]["step"] < 60
    assert card["kept_step"] == checks[-2]["step"] > 0
    kept = settings.out / "checkpoints" / f"checkpoint-{card['kept_step']}"
    assert weights(settings.out) == weights(kept)
    page = (settings.out / "run.md").read_text()
    assert card["ended"].capitalize() in page and f"Kept: the weights of step {card['kept_step']}" in page


def test_a_run_that_made_the_model_worse_says_so(prompts: Path, tmp_path: Path):
    held_out = write_prompts(tmp_path / "held_out.jsonl", 24, "held_out")
    given = {"prompts": str(prompts), "held_out": str(held_out), "learning_rate": 3e-2, "eval_every": 1}
    card = trained(ft(out=tmp_path / "o", fresh_every=1, **given))
    assert "stopped at step 1: " in card["ended"] and card["ended"].endswith("; the untrained model was better")


def test_with_held_out_answers_the_best_score_is_kept(prompts: Path, tmp_path: Path):
    held_out = write_prompts(tmp_path / "held_out.jsonl", 24, "held_out")
    settings = ft(prompts=str(prompts), out=tmp_path / "o", fresh_every=1, steps=6, held_out=str(held_out))
    settings = settings.model_copy(update={"learning_rate": 1e-3})
    card = trained(settings)
    scores = {row["step"]: row["eval_score"] for row in card["log"] if "eval_score" in row and row["step"]}
    assert 0 < max(scores.values()) <= 1
    assert scores[card["kept_step"]] == max(scores.values())


@pytest.mark.parametrize("room", [3, 10])
def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_later(room: int, prompts: Path, tmp_path: Path):
    """For a while, files may not grow beyond 3 MB, where the weights do not fit, or 10, where Adam's state does not."""
    settings = {"prompts": str(prompts), "fresh_every": 1, "steps": 4}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room << 20, limit[1]))
    try:
        with pytest.raises(OSError, match="a checkpoint could not be written to"):
            run(ft(out=tmp_path / "o", **settings))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert trained(ft(out=tmp_path / "o", resume=True, **settings))["ended"] == "all 4 steps were taken"


@pytest.mark.parametrize(
    ("kind", "given", "told"),
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
def test_what_cannot_be_done_is_one_clear_error(
    kind: Any, given: dict[str, Any], told: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("bare.jsonl").write_text('{"prompt": "1+1"}\n')
    Path("empty.jsonl").write_text("")
    with pytest.raises(InputError) as caught:
        run(kind(**{"prompts": str(prompts), "out": "o"} | given))
    assert told in str(caught.value)
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


def test_every_prompt_comes_once_before_any_comes_twice():
    order = drawn_order(5, 12, seed=1)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order[:5] != order[5:10] and len(order) == 12
    assert order == drawn_order(5, 12, seed=1) != drawn_order(5, 12, seed=2)


def test_outputs_from_a_file_are_cut_at_the_longest(tmp_path: Path):
    data = write_outputs(tmp_path / "outputs.jsonl", 8)
    short = trained(ft(outputs=data, out=tmp_path / "short", max_tokens=4))
    full = trained(ft(outputs=data, out=tmp_path / "full"))
    assert curve(short, "loss")[0] != pytest.approx(curve(full, "loss")[0], rel=0.01)
