"""Builds the checker of a task by its name in the scenario: exact, number, boxed or python."""

from typing import Literal

from loadtest.scenario import Checker
from loadtest.tasks.code_checker import CodeChecker
from loadtest.tasks.completion_checker import CompletionChecker
from loadtest.tasks.formula_checker import FormulaChecker
from loadtest.tasks.text_checkers import LAST_NUMBER, TEXT, NumberChecker, TextChecker

TaskChecker = Checker | Literal["completion"]  # one is for ready tasks alone


def build_checker(name: TaskChecker, unsafe: bool = False) -> TextChecker:
    """Build a checker; `unsafe` lets root run code without namespaces.

    Raises:
        ScenarioError: if this machine cannot run it.
    """
    if name == "boxed":
        return FormulaChecker()
    if name == "python":
        return CodeChecker(unsafe=unsafe)
    if name == "completion":
        return CompletionChecker(unsafe=unsafe)
    return NumberChecker(LAST_NUMBER) if name == "number" else TextChecker(TEXT)
