"""A scenario's task as questions with a way to check replies. Knows nothing of who asks them."""

import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from answers.extract import Answer
from demo.problems import problems
from loadtest.scenario import DemoTask, FileTask, Lengths, ReadyTask, ScenarioError, SyntheticTask, Task
from loadtest.tasks.checkers import Equal, checker_of
from loadtest.tasks.ready import FORMS, QUESTION, Form, form_of


@dataclass(frozen=True)
class Question:
    """One thing to ask."""

    index: int  # its position in the task
    text: str  # the user's message
    answer: str | None  # in its checker's normal form; None where the task has none
    max_tokens: int | None = None  # None: the scenario's


@dataclass(frozen=True)
class LoadedTask:
    """Questions, and what is right. To be closed: a checker may have a process."""

    name: str
    questions: list[Question]
    checker: Equal | None = None  # None where there are no answers

    def find(self, reply: str) -> str | None:
        """The answer in a reply, in its normal form: equal answers give equal strings."""
        return self.checker.find(reply) if self.checker else None

    async def check(self, question: Question, reply: str) -> bool | None:
        """Whether a reply is right; None where the task has no answers."""
        if self.checker is None or question.answer is None:
            return None
        return await self.checker.check(question.answer, reply)

    def close(self) -> None:
        """Ends its processes; waits for checks that run, which is seconds at most."""
        if self.checker:
            self.checker.close()


def load_task(task: Task) -> LoadedTask:
    """The questions of a task.

    Raises:
        ScenarioError: naming the file, its line and the field; or the field of the scenario.
    """
    if isinstance(task, DemoTask):
        return LoadedTask(task.type, list(_demo(task)), Equal(Answer()))
    if isinstance(task, SyntheticTask):
        return LoadedTask(task.type, list(_synthetic(task)))
    return _from_file(task, form_of(task) if isinstance(task, FileTask) else FORMS[task.type])


# ---- Drawn


def _demo(task: DemoTask) -> Iterator[Question]:
    for index, problem in enumerate(problems("held_out", task.count, task.seed)):
        yield Question(index, problem.question, str(problem.answer))


def _synthetic(task: SyntheticTask) -> Iterator[Question]:
    """Prompts of about so many tokens.

    Each begins with its number: a server's prefix cache holds whole blocks of tokens (16 in vLLM), so that two prompts
    which part within the first share none, and every prompt costs what its length says. The number and the colon are
    taken for a token each; the colon keeps one number from being the beginning of another.
    """
    rng = random.Random(task.seed)
    for index in range(task.count):
        prompt, output = (
            _draw(rng, task.prompt_tokens, "prompt_tokens"),
            _draw(rng, task.output_tokens, "output_tokens"),
        )
        yield Question(index, f"{index}:" + task.word * (prompt - 2), None, output)


def _draw(rng: random.Random, lengths: Lengths, field: str) -> int:
    """One length in tokens. `least` and `most` cut: they move the mean where they cut much."""
    if lengths.least > lengths.most:
        raise ScenarioError(f"task.{field}: least is {lengths.least}; most must not be below, got {lengths.most}")
    if lengths.shape == "uniform":
        width = lengths.spread * math.sqrt(3)  # half of it, for this standard deviation
        drawn = rng.uniform(lengths.mean - width, lengths.mean + width)
    elif lengths.shape == "lognormal":
        variance = math.log1p((lengths.spread / lengths.mean) ** 2)  # of the logarithm
        drawn = rng.lognormvariate(math.log(lengths.mean) - variance / 2, math.sqrt(variance))
    else:
        drawn = rng.gauss(lengths.mean, lengths.spread)
    return round(min(max(drawn, lengths.least), lengths.most))


# ---- From files


def _from_file(task: FileTask | ReadyTask, form: Form) -> LoadedTask:
    if QUESTION not in form.prompt:
        raise ScenarioError(f"task.prompt: got {form.prompt!r}; must contain {QUESTION}")
    pattern = _compiled(form.pattern)
    checker = checker_of(form.checker)
    try:
        rows = enumerate(islice(_rows(task.path), task.count))
        asked = [_question(i, where, row, form, pattern, checker) for i, (where, row) in rows]
    except ScenarioError as error:
        checker.close()
        raise ScenarioError(f"{task.path}: {error}") from None
    return LoadedTask(task.type, asked, checker)


def _compiled(pattern: str | None) -> re.Pattern[str]:
    try:
        return re.compile(r"(?s:.*)" if pattern is None else pattern)
    except re.error as error:
        raise ScenarioError(f"task.answer_pattern: got {pattern!r}; {error}") from None


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSONL file, or of one JSON array, each with its place in the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(str(error)) from None
    rows = _items(text) if text.lstrip().startswith("[") else _lines(text)
    first = next(rows, None)
    if first is None:
        raise ScenarioError("line 1: the file is empty; must have a JSON object per line")
    yield first
    yield from rows


def _items(text: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(_parsed(text, "the array"), 1):
        yield f"item {number}", row


def _lines(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold U+2028 as it is
        if line.strip():
            yield f"line {number}", _parsed(line, f"line {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ScenarioError(f"{where}: is no JSON: {error}") from None


def _question(index: int, where: str, row: Any, form: Form, pattern: re.Pattern[str], checker: Equal) -> Question:
    if not isinstance(row, dict):
        raise ScenarioError(f"{where}: got {_short(row)}; must be a JSON object")
    asked, answered = _field(row, form.question, where), _field(row, form.answer, where)
    text = _text(row[asked], f"{where}: {asked}")
    given = _text(row[answered], f"{where}: {answered}")
    found = pattern.search(given)
    answer = checker.expected(found[1 if pattern.groups else 0] or "") if found else None
    if answer is None:
        problem = f"is no answer for the checker {form.checker}" if found else f"nothing matches {form.pattern!r}"
        raise ScenarioError(f"{where}: {answered}: got {_short(given)}; {problem}")
    return Question(index, form.prompt.replace(QUESTION, text), answer)


def _field(row: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in row:
            return name
    raise ScenarioError(f"{where}: has no field {' or '.join(names)}; has {', '.join(row) or 'none'}")


def _text(value: object, where: str) -> str:
    """Text or a number; lines of text are joined, as unit tests may be a list."""
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        value = "\n".join(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ScenarioError(f"{where}: got {_short(value)}; must be text or a number")
    if not str(value).strip():
        raise ScenarioError(f"{where}: is empty")
    return str(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
