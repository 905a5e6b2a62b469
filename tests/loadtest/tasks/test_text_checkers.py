"""Replies compared by text and by number."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.tasks.text_checkers import LAST_NUMBER, TEXT, NumberChecker, TextChecker
from tests.answers.cases import CASES, CHECKS, NUMBER_CHECKS, Case
from tests.loadtest.tasks.checking import check

EXACT, NUMBER = TextChecker(TEXT), NumberChecker(LAST_NUMBER)


def test_exact_compares_the_text_or_the_value_of_a_number() -> None:
    assert check(EXACT, " Paris\n", "Paris", "<think>Rome</think> Paris ", "paris", "It is Paris", "") == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert check(EXACT, "0.50", "1/2", "0.51") == [True, False]


@given(value=st.integers(-(10**12), 10**12), other=st.integers(-(10**12), 10**12))
def test_a_number_is_compared_by_value_however_it_is_written(value: int, other: int) -> None:
    forms = [
        str(value),
        f"{value:,}",
        f"{value}.0",
        f"${value}$",
        f"\\boxed{{{value:,}}}",
        f"\\boxed{{{value}/1}}",
        f"{value:+05d}",
    ]
    assert check(NUMBER, str(value), *(f"It was 5, now it is {form}." for form in forms)) == [True] * len(forms)
    assert {NUMBER.normalize(form) for form in (str(value), f"{value:,}", f"${value}", f"{value} euros")} == {
        str(value)
    }
    wrong = [
        f"It is {value} and then {other}",
        f"{value} \\boxed{{{other}}}",
        f"\\boxed{{{other}}} = {value}",
        f"{value}5",
    ]
    assert check(NUMBER, str(value), *wrong) == [other == value] * 3 + [value == 0 and False]


def test_numbers_with_units_and_texts_that_are_no_number() -> None:
    assert check(NUMBER, "18", r"\boxed{18\text{ dollars}}", r"\boxed{x = 18}", r"\boxed{18\%}") == [True] * 3
    assert check(NUMBER, "10", r"\boxed{2^{10}}", r"\boxed{5\text{ or }10}", r"10 \boxed{ten}") == [False] * 3
    assert check(NUMBER, "0.5", r"\boxed{\frac{1}{2}}", r"\boxed{1/2\text{ cup}}", "half") == [True, True, False]
    assert [NUMBER.normalize(text) for text in ("ten", "2^{10}", "1 or 2", "nan")] == [None] * 4


def test_a_long_hostile_box_takes_linear_time() -> None:
    began = time.thread_time()  # processor time: what else runs does not matter
    for text in ("1" + "," * 200_000 + "1", "{" * 200_000, "\\boxed{" * 50_000, "1/" * 100_000):
        NUMBER.find(f"\\boxed{{{text}}}")
    assert time.thread_time() - began < 10


def test_a_reply_without_a_number_has_no_answer() -> None:
    assert NUMBER.find("no number") is None


@pytest.mark.parametrize(("source", "answer", "reply", "correct"), CHECKS + NUMBER_CHECKS)
def test_numbers_as_people_write_them(source: str, answer: str, reply: str, correct: bool) -> None:
    assert check(NUMBER, answer, reply) == [correct], source


@pytest.mark.parametrize("case", [case for case in CASES if NUMBER.normalize(case.boxed) == case.boxed], ids=str)
def test_every_writing_of_a_number_is_correct_for_its_value(case: Case) -> None:
    assert check(NUMBER, case.boxed, rf"\boxed{{{case.written}}}", rf"\boxed{{{case.written}1}}") == [True, False]
