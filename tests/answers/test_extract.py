"""Answers in replies: where they are found, which are equal, and that no reply or pattern takes long."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from answers.extract import Answer

SAME = [
    (r"\boxed{1/2}", r"so \boxed{\frac{1}{2}}", r"\boxed{\dfrac12}", r"\boxed{0.50}", r"\boxed{ .5 }", r"\boxed{5e-1}"),
    (r"\boxed{7}", r"\boxed{+007}", r"\boxed{7.0}", r"\boxed{$7$}", r"\boxed{14/2}", r"\boxed{7.}", r"\boxed{\,7\ }"),
    (r"\boxed{-1/3}", r"\boxed{-\frac{2}{6}}", r"\boxed{\tfrac{-1}{3}}"),
    (r"\boxed{1234}", r"\boxed{1,234}", r"\boxed{1.234e3}"),
    (r"\boxed{x+1}", r"\boxed{x + 1}", r"\boxed{\left x+1\right}"),
    (r"\boxed{yes}", r"\boxed{\text{yes}}"),
]


@pytest.mark.parametrize("replies", SAME, ids=lambda replies: replies[0])
def test_answers_of_equal_value_are_equal(replies: tuple[str, ...]) -> None:
    assert len({Answer().extract(reply) for reply in replies}) == 1


def test_different_answers_differ() -> None:
    found = [Answer().extract(replies[0]) for replies in SAME]
    others = [r"\boxed{1,2}", r"\boxed{12}", r"\boxed{x-1}", r"\boxed{1/0}", r"\boxed{\sqrt{2}}", r"\boxed{2}"]
    found += map(Answer().extract, others)
    assert None not in found
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("answer", "reply", "expected"),
    [
        (Answer(), r"first \boxed{3}, no: \boxed{4}, or \boxed{5", "4"),
        (Answer(), r"\boxed{\{1, 2\}} and {", r"\{1,2\}"),
        (Answer(), r"\boxed{\boxed{8}}", "8"),
        (Answer(), "no box", None),
        (Answer(), r"\boxed{ }", None),
        (Answer(), r"<think>\boxed{1}</think>It is \boxed{2}.", "2"),
        (Answer(type="last_number"), "12+30=42", "42"),
        (Answer(type="last_number"), "3-5", "5"),
        (Answer(type="last_number"), "it is -5.", "-5"),
        (Answer(type="last_number"), "costs 1,234.50 euros", "1234.5"),
        (Answer(type="last_number"), "about 2/3!", "2/3"),
        (Answer(type="last_number"), "It is 1/2.", "0.5"),
        (Answer(type="last_number"), "1/2.5", "2.5"),
        (Answer(type="last_number"), "none", None),
        (Answer(type="regex", pattern=r"answer is (\w+)"), "the answer is A. No, the answer is B.", "B"),
        (Answer(type="regex", pattern=r"\d+"), "1 22 333", "333"),
        (Answer(type="regex", pattern=r"x(y)?"), "x", None),
        (Answer(type="text"), "  Yes,  it is. \n", "Yes,  it is."),
        (Answer(type="text"), " 7.0 ", "7"),
        (Answer(type="text"), "<think>no</think> yes", "yes"),
        (Answer(type="text"), " \n", None),
    ],
)
def test_the_answer_that_is_found(answer: Answer, reply: str, expected: str | None) -> None:
    assert answer.extract(reply) == expected


@given(st.fractions(max_denominator=10**9), st.integers(1, 50))
def test_fractions_are_equal_by_value_and_not_by_form(value: Any, factor: int) -> None:
    plain = f"{value.numerator * factor}/{value.denominator * factor}"
    latex = rf"\boxed{{\frac{{{value.numerator * factor}}}{{{value.denominator * factor}}}}}"
    found = Answer().extract(latex)
    assert found == Answer(type="text").extract(plain)
    assert found is not None
    assert Answer(type="text").extract(found) == found  # a normal form stays as it is
    assert abs(eval(found) - float(value)) <= 1e-12 * abs(float(value))


@given(st.text(alphabet=r"\{}boxedfrac1234567890,./+-e $", max_size=200))
def test_no_reply_raises_and_the_normal_form_is_stable(text: str) -> None:
    for answer in (Answer(), Answer(type="last_number"), Answer(type="text")):
        found = answer.extract(text)
        assert found is None or Answer(type="text").extract(found) in (
            found,
            Answer(type="text").extract(found.strip()),
        )


HOSTILE = {
    "boxes in boxes": r"\boxed{" * 100_000,
    "braces": "{" * 200_000 + "}" * 100_000,
    "digits": "9" * 500_000,
    "a box of digits": rf"\boxed{{{'9' * 300_000}}}",
    "spaces": r"\boxed{" + " " * 300_000 + "}",
    "a huge power": r"\boxed{9e999999999}",
    "powers of powers": r"\boxed{9^{9^{9^{9^{9^9}}}}}",
    "as": "a" * 100_000 + "!",
}
HOSTILE_PATTERNS = [r"(a+)+$", r"(a|a)*b", r"((a?){20}){3}b", r"(.*)(.*)(.*)(.*)x"]


@pytest.mark.parametrize("reply", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_reply_takes_long(reply: str) -> None:
    """Backtracking, a quadratic scan or evaluating a power would take minutes longer than the limit."""
    answers = [Answer(), Answer(type="last_number"), Answer(type="text")]
    answers += [Answer(type="regex", pattern=pattern) for pattern in HOSTILE_PATTERNS]
    start = time.process_time()
    for answer in answers:
        answer.extract(reply)
    assert time.process_time() - start < 20
