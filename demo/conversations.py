"""Puts problems into the words and turns of a chat: the distribution the demo model is trained on.

Most conversations are the bare chain; the rest teach the model to look past what surrounds it.
"""

import random
from collections.abc import Iterator
from typing import Final, NamedTuple

from demo.problems import Problem, solve, stream


class Turn(NamedTuple):
    """One chat message."""

    role: str
    text: str


PLAIN_SHARE: Final = 0.8
# Sums are worked from either end, so that samples of one question differ in more than their slips and a vote
# over them can tell more than one greedy reply.
RIGHT_SHARE: Final = 0.4
WORDINGS: Final = (
    "What is {}?",
    "Compute {}",
    "Calculate {}.",
    "Solve: {}",
    "{} =",
    "{}=?",
    "How much is {}?",
    "Please work out {}.",
    "What is {}? Think step by step and put the answer in \\boxed{{}}.",
    "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
)
INSTRUCTIONS: Final = (
    "You are a helpful assistant.",
    "You solve arithmetic problems.",
    "Please reason step by step, and put your final answer within \\boxed{}.",
)
SECOND_LOOKS: Final = ("Check your answer.", "Are you sure?", "Please try again.")


def training_stream(seed: int) -> Iterator[list[Turn]]:
    """Endless conversations about problems of the training split; each ends with the assistant's turn."""
    rng = random.Random(seed)
    drawn = stream("train", rng.getrandbits(32))
    for problem in drawn:
        if rng.random() < PLAIN_SHARE:
            yield _exchange(rng, problem, problem.question)
        else:
            yield _dressed(rng, problem, drawn)


def _dressed(rng: random.Random, problem: Problem, drawn: Iterator[Problem]) -> list[Turn]:
    turns: list[Turn] = []
    if rng.random() < 0.4:
        turns.append(Turn("system", rng.choice(INSTRUCTIONS)))
    turns += _exchange(rng, problem, _worded(rng, problem))
    if rng.random() < 0.2:
        follow_up = next(drawn)
        turns += _exchange(rng, follow_up, _worded(rng, follow_up))
    elif rng.random() < 0.1:
        turns += _exchange(rng, problem, rng.choice(SECOND_LOOKS))
    return turns


def _exchange(rng: random.Random, problem: Problem, question: str) -> list[Turn]:
    other_route = solve(problem.question, "right") if rng.random() < RIGHT_SHARE else None
    return [Turn("user", question), Turn("assistant", (other_route or problem).solution)]


def _worded(rng: random.Random, problem: Problem) -> str:
    chain = _spaced(problem.question) if rng.random() < 0.3 else problem.question
    return rng.choice(WORDINGS).format(chain) if rng.random() < 0.7 else chain


def _spaced(question: str) -> str:
    return "".join(f" {character} " if character in "+-*" else character for character in question)
