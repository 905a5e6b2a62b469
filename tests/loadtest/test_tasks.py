"""Questions from everywhere that they come from, and what is said of files that are wrong."""

import asyncio
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from answers.extract import Answer
from demo.problems import problems
from loadtest.scenario import ScenarioError, Task
from loadtest.tasks import LoadedTask, load_task

LENGTHS = {"mean": 50, "spread": 10}
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)


@contextmanager
def loaded(**task: Any) -> Iterator[LoadedTask]:
    it = load_task(TypeAdapter(Task).validate_python(task))
    try:
        yield it
    finally:
        it.close()


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def checked(task: LoadedTask, *replies: str) -> list[bool | None]:
    async def all_of_it() -> list[bool | None]:
        return list(await asyncio.gather(*(task.check(task.questions[0], reply) for reply in replies)))

    return asyncio.run(all_of_it())


# ---- Drawn


def test_the_demos_questions_are_those_held_out_and_their_own_solutions_are_right() -> None:
    with loaded(type="demo", count=20, seed=3) as task:
        drawn = problems("held_out", 20, 3)
        assert [question.text for question in task.questions] == [problem.question for problem in drawn]
        assert [question.index for question in task.questions] == list(range(20))
        assert checked(task, drawn[0].solution, f"\\boxed{{{drawn[0].answer + 1}}}", "none") == [True, False, False]
        assert task.find("so \\boxed{ +007 }") == "7"
        assert task.questions[0].max_tokens is None


@given(
    least=st.integers(1, 30),
    seed=st.integers(0, 2**32),
    shape=st.sampled_from(["normal", "uniform", "lognormal"]),
    spread=st.floats(0, 200),
    word=st.sampled_from([" the", "1", ":"]),
)
@settings(deadline=None)
def test_synthetic_prompts_are_the_same_again_and_part_at_once(
    least: int, seed: int, shape: str, spread: float, word: str
) -> None:
    lengths = {"mean": 50, "spread": spread, "shape": shape, "least": least, "most": 90}
    kind: dict[str, Any] = {"type": "synthetic", "count": 30, "seed": seed, "word": word}
    with (
        loaded(**kind, prompt_tokens=lengths, output_tokens=lengths) as task,
        loaded(**kind, prompt_tokens=lengths, output_tokens=lengths) as again,
    ):
        assert task.questions == again.questions
    texts = [question.text for question in task.questions]
    assert len({text.split(":")[0] for text in texts}) == 30
    assert all(text.startswith(f"{i}:") for i, text in enumerate(texts))
    words = [(len(text) - len(f"{i}:")) / len(word) for i, text in enumerate(texts)]
    assert all(max(0, least - 2) <= count <= 88 and count == int(count) for count in words)
    assert all(least <= (question.max_tokens or 0) <= 90 for question in task.questions)
    assert checked(task, "any") == [None]
    assert task.find("\\boxed{1}") is None


@pytest.mark.parametrize("shape", ["normal", "uniform", "lognormal"])
def test_synthetic_lengths_have_the_mean_and_spread_asked_for(shape: str) -> None:
    lengths = {"mean": 500, "spread": 100, "shape": shape}
    with loaded(type="synthetic", count=4000, prompt_tokens={"mean": 3}, output_tokens=lengths) as task:
        drawn = [question.max_tokens or 0 for question in task.questions]
    assert statistics.mean(drawn) == pytest.approx(500, rel=0.01)
    assert statistics.stdev(drawn) == pytest.approx(100, rel=0.1)
    assert {question.text.count(" the") for question in task.questions} == {1}
    with loaded(type="synthetic", seed=1, prompt_tokens={"mean": 3}, output_tokens=lengths) as other:
        assert [question.max_tokens for question in other.questions] != drawn[: len(other.questions)]


def test_lengths_that_cannot_be() -> None:
    with pytest.raises(ScenarioError, match=r"task\.output_tokens: least is 9; .* got 5"):
        load_task(
            TypeAdapter(Task).validate_python(
                {"type": "synthetic", "prompt_tokens": LENGTHS, "output_tokens": {"mean": 7, "least": 9, "most": 5}}
            )
        )


# ---- From files

TEXT = st.text(min_size=1, max_size=40).filter(lambda text: bool(text.strip()))


@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8), ascii_only=st.booleans(), array=st.booleans())
@SAME_FOLDER
def test_a_file_says_what_was_written_to_it(
    tmp_path: Path, rows: list[tuple[str, str]], ascii_only: bool, array: bool
) -> None:
    """Line separators in the text too: U+2028 ends no line of JSON."""
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
        assert checked(task, rows[0][1], rows[0][1] + "x") == [True, False]
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
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path: Path, rows: list[Any], says: str) -> None:
    path = written(tmp_path, *rows)
    with pytest.raises(ScenarioError) as caught, loaded(type="file", path=path, checker="number"):
        pass
    assert str(caught.value).startswith(f"{path}: {says}")


@given(content=st.binary(max_size=60))
@SAME_FOLDER
def test_no_file_breaks_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ScenarioError, match=r"x\.jsonl"), loaded(type="file", path=path):
        pass


def test_a_file_that_is_not_there_or_nested_too_deep(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path, written(tmp_path, "[" * 100_000)):
        with pytest.raises(ScenarioError, match=str(path)), loaded(type="file", path=path):
            pass


def test_what_comes_after_the_first_so_many_is_not_read(tmp_path: Path) -> None:
    with loaded(type="file", path=written(tmp_path, GOOD, "{broken"), count=1) as task:
        assert len(task.questions) == 1


def test_the_part_of_the_field_that_is_the_answer(tmp_path: Path) -> None:
    path = written(tmp_path, {"question": "x", "answer": "so: 12 apples\n"})
    for pattern, answer in ((r": (\d+)", "12"), (r"\d+ \w+", "12 apples"), (None, "so: 12 apples")):
        with loaded(type="file", path=path, answer_pattern=pattern) as task:
            assert task.questions[0].answer == answer
    for pattern, says in (("#", r"line 1: answer: got 'so.*nothing matches '#'"), ("(", r"task\.answer_pattern: got")):
        with pytest.raises(ScenarioError, match=says), loaded(type="file", path=path, answer_pattern=pattern):
            pass
    with pytest.raises(ScenarioError, match=r"task\.prompt: got 'x'; must contain"):
        load_task(TypeAdapter(Task).validate_python({"type": "file", "path": path, "prompt": "x"}))


@pytest.mark.parametrize(
    ("kind", "row", "right", "wrong"),
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
def test_known_benchmarks(tmp_path: Path, kind: str, row: dict[str, Any], right: str, wrong: str) -> None:
    with loaded(type=kind, path=written(tmp_path, row)) as task:
        assert task.name == kind
        assert task.questions[0].text.startswith("P{}\n\n")
        assert ("python" if kind == "scicode" else "\\boxed{}") in task.questions[0].text
        assert checked(task, right, wrong, "") == [True, False, False]


def test_a_benchmarks_file_of_another_form(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "x", "solution": "y"})
    with pytest.raises(ScenarioError) as caught, loaded(type="aime", path=path):
        pass
    assert str(caught.value) == (
        f"{path}: line 1: has no field problem or Problem or question or Question; has prompt, solution"
    )
    path = written(tmp_path, {"question": "x", "answer": "no marks: 4"})
    with pytest.raises(ScenarioError, match=r"line 1: answer: got 'no marks: 4'; nothing matches"):
        load_task(TypeAdapter(Task).validate_python({"type": "gsm8k", "path": path}))
