"""Evaluations: which checkpoint is kept, and when training stops."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from answers.extract import Answer
from em_train.evaluation import GuardedTrainerMixin, is_right
from em_train.guards import Evaluation
from tests.em_train.support import ft, rl, train, weights, write_prompts


def test_the_held_out_score_or_else_the_step_selects_the_checkpoint():
    trainer = GuardedTrainerMixin()
    trainer.state = SimpleNamespace(global_step=7)
    assert trainer._checkpoint_metric(Evaluation(entropy=0.3, length=100, repetition=0.1)) == 7
    assert trainer._checkpoint_metric(Evaluation(entropy=0.3, length=100, repetition=0.1, score=0.6)) == 0.6
    trainer.stop_reason = "outputs have shrunk"
    assert trainer._checkpoint_metric(Evaluation(entropy=0.3, length=10, repetition=0.1, score=0.6)) == -1


@pytest.mark.parametrize(
    ("reply", "wanted", "right"),
    [
        ("3+4=7\n\\boxed{7}", "7", True),
        ("\\boxed{7.0}", "so it is \\boxed{7}", True),  # an answer written as in a reply
        ("\\boxed{8}", "7", False),
        ("7", "7", False),
        ("\\boxed{Yes}", "Yes", True),
        ("\\boxed{A}", "(A)", True),
        ("\\boxed{2 1/2}", "2.5", True),
        ("\\boxed{-5}", "5", False),
    ],
)
def test_an_answer_is_right_if_it_equals_the_wanted_one(reply: str, wanted: str, right: bool):
    assert is_right(Answer(type="boxed"), reply, wanted) is right


@pytest.mark.slow
def test_over_training_is_stopped_and_the_last_healthy_weights_are_kept(prompts: Path, tmp_path: Path):
    """At a rate that is far too high the outputs collapse within a few steps."""
    settings = rl(prompts=str(prompts), out=tmp_path / "o", steps=60, learning_rate=3e-3, entropy_floor=0.02)
    report = train(settings)
    assert "stopped at step" in report["ended"]
    evaluations = [row for row in report["log"] if "eval_keep" in row]
    assert evaluations[-1]["eval_keep"] == -1 and evaluations[-1]["step"] < 60
    assert report["kept_step"] == evaluations[-2]["step"] > 0
    kept = settings.out / "checkpoints" / f"checkpoint-{report['kept_step']}"
    assert weights(settings.out) == weights(kept)
    page = (settings.out / "run.md").read_text()
    assert report["ended"].capitalize() in page and f"Kept: the weights of step {report['kept_step']}" in page


@pytest.mark.slow
def test_with_held_out_answers_the_best_score_is_kept(prompts: Path, tmp_path: Path):
    held_out = write_prompts(tmp_path / "held_out.jsonl", 24, "held_out")
    settings = ft(prompts=str(prompts), out=tmp_path / "o", fresh_every=1, steps=6, held_out=str(held_out))
    settings = settings.model_copy(update={"learning_rate": 1e-3})
    report = train(settings)
    scores = {row["step"]: row["eval_score"] for row in report["log"] if "eval_score" in row and row["step"]}
    assert 0 < max(scores.values()) <= 1
    assert scores[report["kept_step"]] == max(scores.values())
