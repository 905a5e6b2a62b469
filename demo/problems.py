"""Chains of integer arithmetic with their worked solutions, and a checker of replies.

Knows nothing of tokens or models; (split, n, seed) determines the problems. The checker is independent of
answers/extract.py on purpose, so that other code checks the server's.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal

Split = Literal["train", "held_out"]
Route = Literal["left", "right"]

OPERATOR_COUNTS: Final = (1, 2, 3, 4, 5, 6)
# Held-out chains have the most operators: the model solves short ones so reliably that no sampler could gain.
OPERATOR_COUNT_WEIGHTS: Final[dict[Split, tuple[int, ...]]] = {
    "train": (1, 2, 3, 4, 4, 4),
    "held_out": (0, 0, 0, 0, 0, 1),
}
OPERATORS: Final = "+-*"
OPERATOR_WEIGHTS: Final = (3, 3, 2)
OPERAND_DIGITS_WEIGHTS: Final = (2, 3)  # one digit, two digits
LARGEST_VALUE: Final = 999  # absolute value of any intermediate result
HELD_OUT_ONE_IN: Final = 8

_TERM: Final = re.compile(r"([-+]?)([0-9*]+)")
_BOX: Final = re.compile(r"\\boxed\{([^{}]*)\}")
_INTEGER: Final = re.compile(r"\s*([+-]?)\s*([0-9]{1,18})\s*")


@dataclass(frozen=True)
class Problem:
    """A chain such as `12+7*3-4`, the complete worked reply, and the integer in which it ends."""

    question: str
    solution: str
    answer: int


def problems(split: Split, n: int, seed: int) -> list[Problem]:
    """Return the first `n` problems of `split` for `seed`; a short chain may occur twice."""
    return list(islice(stream(split, seed), n))


def stream(split: Split, seed: int) -> Iterator[Problem]:
    """Yield problems of one split, without end."""
    rng = random.Random(seed)
    while True:
        problem = solve(_random_question(rng, OPERATOR_COUNT_WEIGHTS[split]))
        if problem is not None and split_of(problem.question) == split:
            yield problem


def split_of(question: str) -> Split:
    """Return the split of a question, which its text alone determines: no seed can put it into the other."""
    digest = hashlib.sha256("".join(question.split()).encode()).digest()
    return "held_out" if int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0 else "train"


def solve(question: str, route: Route = "left") -> Problem | None:
    """Return the worked problem, products first, each from the end `route`; None if a step exceeds LARGEST_VALUE."""
    groups = [(sign, [int(factor) for factor in product.split("*")]) for sign, product in _TERM.findall(question)]
    lines: list[str] = []
    for _, factors in groups if route == "left" else reversed(groups):
        _fold(factors, "*", route, lines)
    terms = [int(f"{sign}{product}") for sign, (product,) in groups]
    _fold(terms, "+", route, lines)
    if any(abs(int(line.split("=")[1])) > LARGEST_VALUE for line in lines):
        return None
    lines.append(f"\\boxed{{{terms[0]}}}")
    return Problem(question, "\n".join(lines), terms[0])


def check(problem: Problem, reply: str) -> bool:
    r"""Return whether the last `\boxed{...}` of `reply` holds the answer; `+7`, ` 7 ` and `007` all mean 7."""
    return extract_answer(reply) == problem.answer


def extract_answer(reply: str) -> int | None:
    """Return the integer in the last box; None if there is no box or it holds anything but one integer."""
    boxes = _BOX.findall(reply)
    integer = _INTEGER.fullmatch(boxes[-1]) if boxes else None
    return int(integer[1] + integer[2]) if integer else None


def _fold(numbers: list[int], operator: Literal["*", "+"], route: Route, lines: list[str]) -> None:
    """Replace the two numbers at one end by their result, one line each, until one number is left."""
    pair = slice(0, 2) if route == "left" else slice(-2, None)
    while len(numbers) > 1:
        left, right = numbers[pair]
        value = left * right if operator == "*" else left + right
        lines.append(f"{left}*{right}={value}" if operator == "*" else f"{left}{right:+d}={value}")
        numbers[pair] = [value]


def _random_question(rng: random.Random, count_weights: tuple[int, ...]) -> str:
    (count,) = rng.choices(OPERATOR_COUNTS, count_weights)
    operators = rng.choices(OPERATORS, OPERATOR_WEIGHTS, k=count)
    first, *rest = (_random_operand(rng) for _ in range(count + 1))
    return str(first) + "".join(f"{op}{operand}" for op, operand in zip(operators, rest, strict=True))


def _random_operand(rng: random.Random) -> int:
    one_digit, two_digits = range(1, 10), range(10, 100)
    (choices,) = rng.choices((one_digit, two_digits), OPERAND_DIGITS_WEIGHTS)
    return rng.choice(choices)
