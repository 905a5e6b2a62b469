"""Builds the checker of a task by its name in the scenario: exact, number, boxed or python."""

from loadtest.scenario import Checker
from loadtest.tasks.code_checker import CodeChecker
from loadtest.tasks.formula_checker import FormulaChecker
from loadtest.tasks.text_checkers import LAST_NUMBER, TEXT, NumberChecker, TextChecker


def build_checker(name: Checker, unsafe: bool = False) -> TextChecker:
    """Build a checker; `unsafe` lets root run code without namespaces.

    Raises:
        ScenarioError: if this machine cannot run it.
    """
    if name == "boxed":
        return FormulaChecker()
    if name == "python":
        return CodeChecker(unsafe=unsafe)
    return NumberChecker(LAST_NUMBER) if name == "number" else TextChecker(TEXT)
