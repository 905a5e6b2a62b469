"""Checkers by their names in a scenario."""

import pytest

from loadtest.scenario import Checker
from loadtest.tasks.checkers import build_checker
from loadtest.tasks.code_checker import CodeChecker
from loadtest.tasks.formula_checker import FormulaChecker
from loadtest.tasks.text_checkers import NumberChecker, TextChecker


@pytest.mark.parametrize(
    ("name", "kind"),
    [("exact", TextChecker), ("number", NumberChecker), ("boxed", FormulaChecker), ("python", CodeChecker)],
)
def test_a_name_builds_its_checker_which_may_be_closed_twice(name: Checker, kind: type[TextChecker]) -> None:
    checker = build_checker(name)
    assert type(checker) is kind
    checker.close()
    checker.close()
