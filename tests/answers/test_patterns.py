"""A client's pattern: its last match, and how much work it may cost. Steps are counted, not seconds."""

import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from answers.extract import Answer
from answers.patterns import MAX_INSTRUCTIONS, MAX_STEPS, WINDOWS, compile_pattern, last_match

ORDINARY = [
    r"answer is (\w+)",
    r"####\s*(-?[\d,.]+)",
    r"\*\*(.+?)\*\*",
    r"(?m)^Answer: (.*)$",
    r"<answer>\s*([\s\S]*?)\s*</answer>",
    r"(?i)final answer is:?\s*\$?\(?([A-Z]|-?\d+(?:\.\d+)?)\)?\$?\.?",
    r"(?i)\b(monday|tuesday|wednesday|thursday|friday|saturday|sunday)\b",
    r"答案是[::]?\s*(.+?)[。\n]",
]
TOO_LARGE = [
    r"(?:.{0,60}){0,15}z|.",
    r"((((a{1,100}){1,100}){1,100}){1,100})",
    r"(?:(?:a{1,30}){1,30})",
    "a{1000}" * 100,
    r"\p{L}{300}",
    r"\pL|" * 200,
    "(" * 400 + "a" + ")" * 400,
    "(a)" * 11,
]
# Quadratic in the number of matches, states without number, and captures at every step.
EXPENSIVE = [
    r"a.*b|a",
    r".",
    r"",
    r"(?:a?){140}",
    r"(?:.{0,9}){0,3}z|.",
    r"(?:a|b)*a(?:a|b){130}z|.",
    r"(?:[ab]*a[ab]{250})z|.",
    "(" * 10 + "a" + ")*" * 10 + "z|.",
    r"\b|.",
]


class Counted:
    """A compiled pattern that counts the steps of its searches: instructions times the bytes ahead."""

    def __init__(self, pattern: str) -> None:
        self.compiled = compile_pattern(pattern)
        self.programsize, self.reverseprogramsize = self.compiled.programsize, self.compiled.reverseprogramsize
        self.groups = self.compiled.groups
        self.steps = 0

    def finditer(self, text: bytes, start: int) -> Iterator[Any]:
        self._count(len(text) - start)
        for match in self.compiled.finditer(text, start):
            yield match
            self._count(len(text) - match.end())

    def _count(self, ahead: int) -> None:
        self.steps += self.programsize * ahead


@pytest.mark.parametrize("pattern", EXPENSIVE + ORDINARY)
@pytest.mark.parametrize("letters", ["a", "ab", "7 ", "é", "a\n", "**"])
def test_the_steps_of_an_extraction_have_a_limit(pattern: str, letters: str) -> None:
    text = "".join(random.Random(1).choices(letters, k=60_000))
    counted = Counted(pattern)
    last_match(counted, text)
    assert counted.steps <= len(WINDOWS) * MAX_STEPS + MAX_INSTRUCTIONS * sum(WINDOWS)


@pytest.mark.parametrize("pattern", TOO_LARGE)
def test_large_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(
        ValidationError, match=r"`pattern` (is too large|has \d+ groups|is not in RE2's syntax: invalid)"
    ):
        Answer(type="regex", pattern=pattern)


def test_the_error_names_the_size_and_the_limit() -> None:
    with pytest.raises(ValidationError, match="is too large: 1004 instructions of RE2, at most 300"):
        Answer(type="regex", pattern="a{1000}")
    with pytest.raises(ValidationError, match="has 11 groups, at most 10"):
        Answer(type="regex", pattern="(a)" * 11)
    with pytest.raises(ValidationError, match="not in RE2's syntax: missing"):
        Answer(type="regex", pattern="(a")
    with pytest.raises(ValidationError):
        Answer(type="regex", pattern="\ud800")


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns_are_far_below_the_limit(pattern: str) -> None:
    assert compile_pattern(pattern).programsize < MAX_INSTRUCTIONS / 3


@given(
    st.text(alphabet="ab1é \n*", max_size=60), st.sampled_from([r"\d+", r"(?m)^a(.)", r"\*\*(.+?)\*\*", "a.*b|a", "b$"])
)
def test_in_a_short_text_it_is_the_last_match_of_all(text: str, pattern: str) -> None:
    matches = list(re.finditer(pattern.replace("$", r"\Z"), text))
    expected = matches[-1][re.compile(pattern).groups] if matches else None
    assert last_match(compile_pattern(pattern), text) == expected


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"answer is (\w+)", "answer is A. " + "x" * 30_000, None),  # before the end that is searched
        (r"answer is (\w+)", "answer is A. " + "x" * 10_000, "A"),
        (r"answer is (\w+)", "answer is A. " * 900 + "answer is B.", "B"),  # more matches than may be searched for
        (r"answer is (\w+)", "answer is A. " * 900 + "answer is B. " + "x" * 3_000, "A"),  # the last that was found
        (r"\d+", "7 " * 30_000 + "42", "42"),
        (r"^\d+", "7" * 30_000, None),  # a window's beginning is no text's beginning
        (r"\b\w", "x" * 19_999 + "y", "x"),
        (r"(.)$", "é" * 20_000 + "😀", "😀"),
        (r"x(y)?", "x", None),
        (r"a", "\ud800a", "a"),
    ],
)
def test_in_a_long_text_the_end_is_searched(pattern: str, text: str, expected: str | None) -> None:
    assert last_match(compile_pattern(pattern), text) == expected
