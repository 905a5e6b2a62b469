"""Accuracies and votes, on replies written by hand."""

import pytest

from demo.evaluate import accuracy, vote, vote_accuracy
from demo.problems import Problem

ASKED = [Problem("3+4", "", 7), Problem("3-4", "", -1)]


def boxed(*answers: int) -> list[str]:
    return [f"\\boxed{{{answer}}}" for answer in answers]


def test_accuracy_is_the_share_of_right_replies() -> None:
    assert accuracy(ASKED, boxed(7, 1)) == 0.5
    assert accuracy(ASKED, boxed(7, -1)) == 1.0
    assert accuracy(ASKED, ["", "-1"]) == 0.0


@pytest.mark.parametrize(
    ("replies", "winner"),
    [
        (boxed(8, 7, 7), 7),
        (["", "no", *boxed(7), ""], 7),  # a reply without an answer is no vote
        (boxed(8, 7), 8),
        (["\\boxed{07}", "\\boxed{ 7}", *boxed(8)], 7),
        ([], None),
        (["7"], None),
    ],
)
def test_the_vote_goes_to_the_most_frequent_answer(replies: list[str], winner: int | None) -> None:
    assert vote(replies) == winner


def test_each_problem_has_its_own_vote_over_the_samples() -> None:
    samples = [boxed(7, 1), boxed(7, -1), boxed(8, 1)]
    assert vote_accuracy(ASKED, samples) == 0.5
    assert vote_accuracy(ASKED, [*samples, boxed(8, -1), boxed(7, -1)]) == 1.0
