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
