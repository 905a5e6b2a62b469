"""Questions generated from a seed: demo problems and synthetic prompts."""

import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from demo.problems import problems
from loadtest.scenario import ScenarioError, Task
from loadtest.tasks.registry import load_task
from tests.loadtest.tasks.loading import check, loaded

LENGTHS = {"mean": 50, "spread": 10}


def test_demo_questions_are_held_out_problems_with_correct_solutions() -> None:
    with loaded(type="demo", count=20, seed=3) as task:
        drawn = problems("held_out", 20, 3)
        assert [question.text for question in task.questions] == [problem.question for problem in drawn]
        assert [question.index for question in task.questions] == list(range(20))
        assert check(task, drawn[0].solution, f"\\boxed{{{drawn[0].answer + 1}}}", "none") == [True, False, False]
        assert task.find("so \\boxed{ +007 }") == "7"
        assert task.questions[0].max_tokens is None


@given(
    least=st.integers(1, 30),
    seed=st.integers(0, 2**31 - 1),
    shape=st.sampled_from(["normal", "uniform", "lognormal"]),
    spread=st.floats(0, 200),
    word=st.sampled_from([" the", "1", ":"]),
)
def test_synthetic_prompts_are_reproducible_and_differ_from_the_start(
    least: int, seed: int, shape: str, spread: float, word: str
) -> None:
    lengths = {"mean": 50, "spread": spread, "shape": shape, "least": least, "most": 90}
    kind: dict[str, Any] = {"type": "synthetic", "count": 30, "seed": seed, "word": word}
    with (
        loaded(**kind, prompt_tokens=lengths, output_tokens=lengths) as task,
        loaded(**kind, prompt_tokens=lengths, output_tokens=lengths) as again,
    ):
        assert task.questions == again.questions
    texts = [question.text for question in task.questions]
    assert len({text.split(":")[0] for text in texts}) == 30
    assert all(text.startswith(f"{i}:") for i, text in enumerate(texts))
    words = [(len(text) - len(f"{i}:")) / len(word) for i, text in enumerate(texts)]
    assert all(max(0, least - 2) <= count <= 88 and count == int(count) for count in words)
    assert all(least <= (question.max_tokens or 0) <= 90 for question in task.questions)
    assert check(task, "any") == [None]
    assert task.find("\\boxed{1}") is None


@pytest.mark.parametrize("shape", ["normal", "uniform", "lognormal"])
def test_synthetic_lengths_have_the_requested_mean_and_spread(shape: str) -> None:
    lengths = {"mean": 500, "spread": 100, "shape": shape}
    with loaded(type="synthetic", count=4000, prompt_tokens={"mean": 3}, output_tokens=lengths) as task:
        drawn = [question.max_tokens or 0 for question in task.questions]
    assert statistics.mean(drawn) == pytest.approx(500, rel=0.01)
    assert statistics.stdev(drawn) == pytest.approx(100, rel=0.1)
    assert {question.text.count(" the") for question in task.questions} == {1}
    with loaded(type="synthetic", seed=1, prompt_tokens={"mean": 3}, output_tokens=lengths) as other:
        assert [question.max_tokens for question in other.questions] != drawn[: len(other.questions)]


def test_contradictory_lengths_are_an_error() -> None:
    with pytest.raises(ScenarioError, match=r"task\.output_tokens: least is 9; .* got 5"):
        load_task(
            TypeAdapter(Task).validate_python(
                {"type": "synthetic", "prompt_tokens": LENGTHS, "output_tokens": {"mean": 7, "least": 9, "most": 5}}
            )
        )
