"""Checkers that compare text and numbers: no process, no computer algebra."""

import re
from dataclasses import dataclass

from answers.extract import Answer
from answers.numbers import find_numbers

TEXT, BOXED, LAST_NUMBER = Answer(type="text"), Answer(type="boxed"), Answer(type="last_number")

_VALUE = re.compile(r"-?\d+(?:\.\d+|/\d+)?(?:e-?\d+)?")  # how Answer writes a number


@dataclass(frozen=True)
class Verdict:
    """Whether a reply is correct."""

    correct: bool
    problem: str | None = None  # why it is not, if there is more to say; its kind, or "KIND: more"


class TextChecker:
    """A reply is correct if its answer has the expected normal form. The base of all checkers."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def normalize(self, given: str) -> str | None:
        """Return the normal form of an answer from a file; None if it cannot be an answer."""
        return TEXT.extract(given)

    def find(self, reply: str) -> str | None:
        """Return the answer in a reply, in its normal form; None without one."""
        return self.answer.extract(reply)

    async def check(self, expected: str, reply: str) -> Verdict:
        """Return whether a reply has the expected answer."""
        return Verdict(self.find(reply) == expected)

    def close(self) -> None:
        """End the checker's processes, if it has any."""


class NumberChecker(TextChecker):
    """Compares by value the number in the last box, or without a box the last number in the reply."""

    def normalize(self, given: str) -> str | None:
        """Return a number without its unit; None for anything else."""
        number = _single_number(TEXT.extract(given) or "")
        return number if _VALUE.fullmatch(number) else None

    def find(self, reply: str) -> str | None:
        """Return the number, or the content of a box that holds none."""
        boxed = BOXED.extract(reply)
        return super().find(reply) if boxed is None else _single_number(boxed)


def _single_number(text: str) -> str:
    """Return the only number of a text such as `18 dollars`; a text with two, such as `2^{10}`, unchanged."""
    alone = len(find_numbers(text)) == 1 and not _VALUE.fullmatch(text)
    return (LAST_NUMBER.extract(text) if alone else None) or text
