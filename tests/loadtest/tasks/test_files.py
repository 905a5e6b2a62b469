"""Questions from files, and the errors for files that are wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from answers.extract import Answer
from loadtest.scenario import ScenarioError, Task
from loadtest.tasks.registry import load_task
from tests.loadtest.tasks.loading import check, loaded, write_file

SAME_FOLDER = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=50
)

TEXT = st.text(min_size=1, max_size=40).filter(lambda text: bool(text.strip()))


@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8), ascii_only=st.booleans(), array=st.booleans())
@SAME_FOLDER
def test_a_file_is_read_as_it_was_written(
    tmp_path: Path, rows: list[tuple[str, str]], ascii_only: bool, array: bool
) -> None:
    """Texts may contain line separators: U+2028 does not end a line of JSON."""
    objects = [{"q": question, "a": answer, "else": [1]} for question, answer in rows]
    lines = [json.dumps(each, ensure_ascii=ascii_only) for each in objects]
    path = tmp_path / "x.jsonl"
    path.write_text(f"[{','.join(lines)}]" if array else "\n\n".join(lines), encoding="utf-8")
    expected = [Answer(type="text").extract(answer) for _, answer in rows]
    if None in expected:
        return
    with loaded(type="file", path=path, question="q", answer="a", prompt="Say {question} {}") as task:
        assert [question.text for question in task.questions] == [f"Say {text} {{}}" for text, _ in rows]
        assert [question.answer for question in task.questions] == expected
        assert check(task, rows[0][1], rows[0][1] + "x") == [True, False]
    with loaded(type="file", path=path, question="q", answer="a", count=1) as task:
        assert len(task.questions) == 1


GOOD = {"question": "1+1", "answer": 2}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([GOOD, "{broken"], "line 2: is no JSON"),
        ([GOOD, "", "7"], "line 3: got 7; must be a JSON object"),
        ([GOOD, {"question": "x", "Answer": 1}], "line 2: has no field answer; has question, Answer"),
        ([{}], "line 1: has no field question; has none"),
        ([{"question": ["x", 1], "answer": 2}], "line 1: question: got ['x', 1]; must be text or a number"),
        ([{"question": "x", "answer": None}], "line 1: answer: got None; must be text or a number"),
        ([{"question": "x", "answer": True}], "line 1: answer: got True; must be"),
        ([{"question": "x", "answer": " "}], "line 1: answer: is empty"),
        ([{"question": "", "answer": "1"}], "line 1: question: is empty"),
        ([{"question": "x", "answer": "two"}], "line 1: answer: got 'two'; is no answer for the checker number"),
        ([], "line 1: the file is empty"),
        ([" "], "line 1: the file is empty"),
        (['[{"question": 1, "answer": 1}, 2]'], "item 2: got 2; must be a JSON object"),
        (["[1"], "the array: is no JSON"),
    ],
)
def test_errors_in_a_file_name_the_line(tmp_path: Path, rows: list[Any], says: str) -> None:
    path = write_file(tmp_path, *rows)
    with pytest.raises(ScenarioError) as caught, loaded(type="file", path=path, checker="number"):
        pass
    assert str(caught.value).startswith(f"{path}: {says}")


@given(content=st.binary(max_size=60))
@SAME_FOLDER
def test_random_bytes_are_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ScenarioError, match=r"x\.jsonl"), loaded(type="file", path=path):
        pass


def test_a_missing_or_too_deeply_nested_file_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path, write_file(tmp_path, "[" * 100_000)):
        with pytest.raises(ScenarioError, match=str(path)), loaded(type="file", path=path):
            pass


def test_rows_after_the_count_are_not_read(tmp_path: Path) -> None:
    with loaded(type="file", path=write_file(tmp_path, GOOD, "{broken"), count=1) as task:
        assert len(task.questions) == 1


def test_a_pattern_selects_the_answer_inside_its_field(tmp_path: Path) -> None:
    path = write_file(tmp_path, {"question": "x", "answer": "so: 12 apples\n"})
    for pattern, answer in ((r": (\d+)", "12"), (r"\d+ \w+", "12 apples"), (None, "so: 12 apples")):
        with loaded(type="file", path=path, answer_pattern=pattern) as task:
            assert task.questions[0].answer == answer
    for pattern, says in (("#", r"line 1: answer: got 'so.*nothing matches '#'"), ("(", r"task\.answer_pattern: got")):
        with pytest.raises(ScenarioError, match=says), loaded(type="file", path=path, answer_pattern=pattern):
            pass
    with pytest.raises(ScenarioError, match=r"task\.prompt: got 'x'; must contain"):
        load_task(TypeAdapter(Task).validate_python({"type": "file", "path": path, "prompt": "x"}))
