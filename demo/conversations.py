"""Problems as chat conversations: the distribution on which the demo model is trained.

Most conversations ask the bare chain; the others add instructions, wordings and more turns around it.
"""

import random
from collections.abc import Iterator
from typing import Final, NamedTuple

from demo.problems import Problem, solve, stream


class Turn(NamedTuple):
    """One chat message."""

    role: str
    text: str


BARE_SHARE: Final = 0.8
# Some sums are worked from the right, so that correct samples of one question differ too, and a vote over samples can
# beat one greedy reply.
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
    """Yield conversations about problems of the training split, without end; each ends with the assistant's turn."""
    rng = random.Random(seed)
    problems = stream("train", rng.getrandbits(32))
    for problem in problems:
        if rng.random() < BARE_SHARE:
            yield _exchange(rng, problem, problem.question)
        else:
            yield _varied(rng, problem, problems)


def _varied(rng: random.Random, problem: Problem, problems: Iterator[Problem]) -> list[Turn]:
    """Return a conversation about `problem` with any of: a system turn, other wordings, a second question."""
    turns: list[Turn] = []
    if rng.random() < 0.4:
        turns.append(Turn("system", rng.choice(INSTRUCTIONS)))
    turns += _exchange(rng, problem, _worded(rng, problem))
    if rng.random() < 0.2:
        follow_up = next(problems)
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
