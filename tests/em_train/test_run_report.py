"""The report of a run: complete or not written at all, and honest about a run that made the model worse."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from em_train.guards import Evaluation
from em_train.run_report import RunReport, _write_atomically
from tests.em_train.support import ft, train, write_prompts


@pytest.mark.parametrize(
    ("stop_reason", "best", "ended"),
    [
        (None, 0.7, "all 6 steps were taken"),
        ("outputs have shrunk", 0.7, "stopped at step 6: outputs have shrunk"),
        ("outputs have shrunk", 0.5, "stopped at step 6: outputs have shrunk; the untrained model was better"),
        (None, 0.5, "all 6 steps were taken; the untrained model was better"),
    ],
)
def test_the_report_says_why_the_training_ended(
    stop_reason: str | None, best: float, ended: str, data: Path, tmp_path: Path
):
    trainer = SimpleNamespace(
        args=SimpleNamespace(world_size=1),
        state=SimpleNamespace(global_step=6, best_metric=best),
        stop_reason=stop_reason,
        past_evaluations=lambda: [Evaluation(entropy=0.3, length=100, repetition=0.1, score=0.6)],
    )
    assert RunReport(ft(outputs=data, out=tmp_path), [], [], trainer).ended == ended


@pytest.mark.slow
def test_a_run_that_made_the_model_worse_says_so(prompts: Path, tmp_path: Path):
    held_out = write_prompts(tmp_path / "held_out.jsonl", 24, "held_out")
    given = {"prompts": str(prompts), "held_out": str(held_out), "learning_rate": 3e-2, "eval_every": 1}
    report = train(ft(out=tmp_path / "o", fresh_every=1, **given))
    assert "stopped at step 1: " in report["ended"] and report["ended"].endswith("; the untrained model was better")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.json"
    _write_atomically(path, "old")

    def full_disk(_: int) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            _write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    _write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
