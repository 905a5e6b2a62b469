"""Every writing in the table of cases, in votes."""

import pytest

from answers.extract import Answer
from tests.answers.cases import BOXES, CASES, Case


def test_the_table_is_large_and_its_forms_are_stable() -> None:
    assert len(CASES) >= 150
    assert len({case.written for case in CASES}) > 0.95 * len(CASES)
    for case in CASES:
        assert Answer().extract(rf"\boxed{{{case.boxed}}}") == case.boxed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.written)
def test_a_writing_has_its_form_in_a_box_and_in_a_sentence(case: Case) -> None:
    assert Answer().extract(rf"First \boxed{{1}}, then \boxed{{{case.written}}}.") == case.boxed
    assert Answer(type="last_number").extract(f"The answer is {case.written}.") == case.last_number()
    assert Answer(type="last_number").extract(f"The answer is: {case.written}") == case.last_number()
    assert Answer(type="regex", pattern="is: (.*)").extract(f"The answer is: {case.written}") == case.boxed


@pytest.mark.parametrize(("source", "reply", "expected"), BOXES, ids=[reply for _, reply, _ in BOXES])
def test_where_a_box_is(source: str, reply: str, expected: str | None) -> None:
    assert Answer().extract(reply) == expected, source
