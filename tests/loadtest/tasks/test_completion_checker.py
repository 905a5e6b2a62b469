"""Functions that a reply completes, in the forms in which models write them."""

import json
from collections.abc import Iterator

import pytest

from loadtest.tasks.completion_checker import Completion, CompletionChecker
from tests.loadtest.tasks.checking import verdicts

STUB = '''import math
from typing import List


def square(x: float) -> float:
    return x * x


def norm(values: List[float]) -> float:
    """Return the root of the sum of squares.

    >>> norm([3, 4])
    5.0
    """
'''
TESTS = "def check(candidate):\n    assert candidate([3, 4]) == 5\n    assert candidate([]) == 0\n\ncheck(norm)\n"
QUESTION = Completion(STUB, "norm", TESTS).to_json()
BODY = "    total = 0\n    for value in values:\n        total += square(value)\n    return math.sqrt(total)\n"
FUNCTION = f"def norm(values: List[float]) -> float:\n{BODY}"


@pytest.fixture(scope="module")
def checker() -> Iterator[CompletionChecker]:
    checker = CompletionChecker(unsafe=True)
    yield checker
    checker.close()


@pytest.mark.parametrize(
    "code",
    [
        STUB + BODY,
        FUNCTION,
        BODY,
        "    # adds up\n" + BODY,
        BODY.replace("\n    ", "\n")[4:],  # dedented
        BODY[4:],  # its first line alone
        "for value in [0]:  # one\n        pass\n" + BODY,
        "return math.sqrt(sum(\n    square(value)\n    for value in values\n))",
        "if not values:  # nothing\n    return 0\nelse:\n    return math.sqrt(sum(map(square, values)))",
        f"from __future__ import annotations\nx: undefined = 1\n{FUNCTION}",
        f"def square(x):\n    return x ** 2\n\n\n{FUNCTION}",
        "\n".join("  " + line for line in FUNCTION.split("\n")),
        "norm = lambda values: math.hypot(*values)",
        f"```python\n{FUNCTION}```\nAn example:\n```python\nprint(norm([1, 2]))\n```",
    ],
)
def test_a_function_or_its_body_is_correct(checker: CompletionChecker, code: str) -> None:
    in_block, alone = verdicts(checker, QUESTION, code if "```" in code else f"So:\n```python\n{code}\n```", code)
    assert (in_block.correct, alone.correct) == (True, True), (in_block.problem, alone.problem)


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("", "no code in the reply"),
        ("```python\n\n```", "no code in the reply"),
        ("    pass", "AssertionError in tests.py: line 2"),
        (f"```python\n{STUB}```", "AssertionError in tests.py: line 2"),
        (FUNCTION.replace("norm", "other"), "AssertionError in tests.py: line 2"),
        ("I do not know.", "SyntaxError in solution.py: line 15"),
        ("return values[0] if values else 0", "AssertionError in tests.py: line 2"),
    ],
)
def test_what_completes_no_function_is_wrong(checker: CompletionChecker, reply: str, problem: str) -> None:
    (verdict,) = verdicts(checker, QUESTION, reply)
    assert not verdict.correct
    assert (verdict.problem or "").startswith(problem)


def test_a_whole_function_needs_no_body_in_the_stub(checker: CompletionChecker) -> None:
    question = Completion("def norm(values):\n", "norm", TESTS).to_json()
    wrong, right = verdicts(checker, question, "return -1", "def norm(v): return sum(x * x for x in v) ** .5")
    assert (wrong.correct, right.correct) == (False, True)


def test_tests_that_are_no_python_are_no_answer(checker: CompletionChecker) -> None:
    assert checker.normalize(json.dumps({"stub": STUB, "entry_point": "norm", "tests": "assert ("})) is None
