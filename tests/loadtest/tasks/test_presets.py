"""Formats in which known benchmarks are published."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from loadtest.scenario import ScenarioError, Task
from loadtest.tasks.registry import load_task
from tests.loadtest.tasks.loading import check, loaded, write_file


@pytest.mark.parametrize(
    ("kind", "row", "correct", "wrong"),
    [
        ("math500", {"problem": "P{}", "answer": r"\frac{\sqrt{3}}{2}"}, r"\boxed{\sqrt{3}/2}", r"\boxed{\sqrt{3}}"),
        ("math500", {"problem": "P{}", "solution": r"so $\boxed{7}$.", "level": 5}, r"\boxed{7}", r"\boxed{8}"),
        ("math500", {"problem": "P{}", "expected_answer": "7", "answer": "8"}, r"\boxed{7}", r"\boxed{8}"),
        ("minerva", {"problem": "P{}", "solution": r"\boxed{1}, then \boxed{5e-3}."}, r"\boxed{0.005}", r"\boxed{1}"),
        ("minerva", {"question": "P{}", "answer": "2 \\pi"}, r"\boxed{\pi \cdot 2}", r"\boxed{2}"),
        ("minerva", {"problem": "P{}", "expected_answer": 3, "solution": "x"}, r"\boxed{3}", r"\boxed{x}"),
        ("aime", {"problem": "P{}", "expected_answer": "73", "solution": "x"}, r"\boxed{73}", r"\boxed{74}"),
        ("amc", {"problem": "P{}", "expected_answer": 142.0}, r"\boxed{142}", r"\boxed{14}"),
        ("aime", {"Problem": "P{}", "Answer": 73}, r"\boxed{073}", r"\boxed{74}"),
        ("aime", {"problem": "P{}", "answer": "073"}, "it is 73", "73 or 74"),
        ("amc", {"problem": "P{}", "answer": 142.0}, r"\boxed{142}", r"142 \boxed{14}"),
        ("gsm8k", {"question": "P{}", "answer": "2*617=1234\n#### 1,234"}, r"\boxed{\$1,234}", r"\boxed{617}"),
        ("scicode", {"prompt": "P{}", "test": "assert f(2) == 4"}, "```python\ndef f(x): return 2 * x\n```", "f = 4"),
        ("scicode", {"prompt": "P{}", "test": ["y = f(2)", "assert y == 4"]}, "f = lambda x: x * x", "f = abs"),
    ],
)
def test_presets_read_and_check_known_benchmarks(
    tmp_path: Path, kind: str, row: dict[str, Any], correct: str, wrong: str
) -> None:
    with loaded(type=kind, path=write_file(tmp_path, row)) as task:
        assert task.name == kind
        assert task.questions[0].text.startswith("P{}\n\n")
        assert ("python" if kind == "scicode" else "\\boxed{}") in task.questions[0].text
        assert check(task, correct, wrong, "") == [True, False, False]


HUMANEVAL = {
    "task_id": "X/0",
    "prompt": 'from typing import List\n\n\ndef total(of: List[int]) -> int:\n    """Add up {question}."""\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(of)\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n\n",
}


def test_humaneval_asks_to_complete_a_function(tmp_path: Path) -> None:
    with loaded(type="humaneval", path=write_file(tmp_path, HUMANEVAL)) as task:
        stub = HUMANEVAL["prompt"].strip()
        assert task.questions[0].text.startswith(f"Complete this Python function:\n\n```python\n{stub}\n```\n\nReply")
        solution = HUMANEVAL["canonical_solution"]
        right = [solution, f"```python\n{HUMANEVAL['prompt']}{solution}```", f"def total(of: List[int]):\n{solution}"]
        assert check(task, *right, "", "    return 0") == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"entry_point": "a b"}, "line 1: entry_point: got 'a b'; must be the name of a function"),
        ({"entry_point": None}, "line 1: entry_point: got None; must be text or a number"),
        ({"test": "assert ("}, "line 1: test: got 'assert ('; is no answer for the checker completion"),
    ],
)
def test_errors_in_a_humaneval_file_name_the_field(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = write_file(tmp_path, HUMANEVAL | change)
    with pytest.raises(ScenarioError) as caught, loaded(type="humaneval", path=path):
        pass
    assert str(caught.value) == f"{path}: {says}"


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Write it.", "test_setup_code": "", "challenge_test_list": ["assert area(0) == 1"]},
        {"prompt": "Write it.", "test_imports": ["import math"]},
        {"text": "Write it.", "test_setup_code": "import math\nradius = 1"},
    ],
)
def test_mbpp_shows_its_tests_and_runs_them(tmp_path: Path, row: dict[str, Any]) -> None:
    tests = ["assert round(area(1), 2) == 3.14", "assert area(0) == 0"]
    if row.keys() & {"test_imports"} or row.get("test_setup_code"):
        tests.append("assert area(1) == math.pi")
    with loaded(type="mbpp", path=write_file(tmp_path, row | {"task_id": 1, "code": "x", "test_list": tests})) as task:
        text = task.questions[0].text
        assert text.startswith("Write it.\n\nYour code should pass these tests:\n\n" + "\n".join(tests) + "\n\nReply")
        right = "```python\nfrom math import pi\ndef area(r):\n    return pi * r * r\n```"
        assert check(task, right, "def area(r): return 3.14 * r + r - r", "") == [True, len(tests) == 2, False]


def test_a_solution_without_a_box_is_an_error(tmp_path: Path) -> None:
    path = write_file(tmp_path, {"problem": "x", "solution": "so 4"})
    with pytest.raises(ScenarioError) as caught, loaded(type="minerva", path=path):
        pass
    assert str(caught.value) == f"{path}: line 1: solution: got 'so 4'; has no \\boxed{{}}"


def test_a_benchmark_file_in_another_format_is_an_error(tmp_path: Path) -> None:
    path = write_file(tmp_path, {"prompt": "x", "solution": "y"})
    with pytest.raises(ScenarioError) as caught, loaded(type="aime", path=path):
        pass
    assert str(caught.value) == (
        f"{path}: line 1: has no field problem or Problem or question or Question; has prompt, solution"
    )
    path = write_file(tmp_path, {"question": "x", "answer": "no marks: 4"})
    with pytest.raises(ScenarioError, match=r"line 1: answer: got 'no marks: 4'; nothing matches"):
        load_task(TypeAdapter(Task).validate_python({"type": "gsm8k", "path": path}))
