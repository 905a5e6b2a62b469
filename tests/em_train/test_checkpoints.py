"""Checkpoints: kill -9 and resume, an interrupted write, a full disk."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from em_train.checkpoints import write_errors_as_oserror
from em_train.prompts import InputError
from em_train.run import run
from tests.em_train.support import SMALL, curve, ft, rl, train, weights

# Each samples outputs while it trains, so that a wrong random state would change the result.
RUNS = {
    "ft": lambda prompts, **more: ft(prompts=str(prompts), fresh_every=1, steps=4, **more),
    "rl": lambda prompts, **more: rl(prompts=str(prompts), steps=4, **more),
    "lora": lambda prompts, **more: ft(prompts=str(prompts), fresh_every=2, steps=4, lora_rank=4, **more),
}


@pytest.mark.parametrize("kind", ["ft", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("rl", "lora"))])
def test_a_resumed_run_ends_with_the_same_bits_as_an_uninterrupted_one(kind: str, prompts: Path, tmp_path: Path):
    """Interrupted between two checkpoints, while the second was being written."""
    complete = train(RUNS[kind](prompts, out=tmp_path / "complete"))
    interrupted = tmp_path / "interrupted"
    shutil.copytree(tmp_path / "complete", interrupted)
    for file in interrupted.glob("*.safetensors"):
        file.unlink()
    incomplete = interrupted / "checkpoints" / "checkpoint-4"
    (incomplete / "trainer_state.json").write_text('{"half": ')
    resumed = train(RUNS[kind](prompts, out=interrupted, resume=True))
    assert weights(interrupted) == weights(tmp_path / "complete")
    assert [row for row in resumed["log"] if "loss" in row and row["step"] > 2]
    for name in ("loss", "eval_entropy", "eval_length"):
        assert curve(resumed, name) == curve(complete, name), name


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_saved(prompts: Path, tmp_path: Path):
    """A real process, killed after its first checkpoint; the resumed run ends as an uninterrupted one."""
    settings = {"prompts": str(prompts), "fresh_every": 1, "steps": 8}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | settings).items()]
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "em_train.cli", "ft", *flags, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not (out / "checkpoints" / "checkpoint-2" / "trainer_state.json").is_file():
            assert process.poll() is None, process.communicate()[1][-2000:]
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not list(out.glob("*.safetensors")), "the run ended before it was killed"
    assert json.loads((out / "run.json").read_text())["ended"] is None
    with pytest.raises(InputError, match="holds a run already; --resume goes on with it"):
        run(ft(out=out, **settings))
    with pytest.raises(InputError, match=r"--learning-rate: got 0\.5; the run in .* has 0\.0001"):
        run(ft(out=out, resume=True, **settings | {"learning_rate": 0.5}))
    report = train(ft(out=out, resume=True, **settings))
    assert report["ended"] == "all 8 steps were taken"
    train(ft(out=tmp_path / "alone", **settings))
    assert weights(out) == weights(tmp_path / "alone")


def test_only_errors_of_writing_become_an_oserror(data: Path, tmp_path: Path):
    settings = ft(outputs=data, out=tmp_path)
    for error in (SafetensorError("disk"), RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos")):
        with pytest.raises(OSError, match="a checkpoint could not be written to"), write_errors_as_oserror(settings):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), write_errors_as_oserror(settings):
        raise RuntimeError("shapes do not match")


@pytest.mark.slow
@pytest.mark.parametrize("room", [3, 10])
def test_a_full_disk_is_one_clear_error_and_the_run_can_be_resumed(room: int, prompts: Path, tmp_path: Path):
    """Limits files to 3 MB for the first run, less than the weights, or to 10 MB, less than Adam's state."""
    settings = {"prompts": str(prompts), "fresh_every": 1, "steps": 2}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room << 20, limit[1]))
    try:
        with pytest.raises(OSError, match="a checkpoint could not be written to"):
            run(ft(out=tmp_path / "o", **settings))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert train(ft(out=tmp_path / "o", resume=True, **settings))["ended"] == "all 2 steps were taken"
