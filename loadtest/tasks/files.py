"""Questions from JSONL or JSON files. Errors name the file, the line and the field.

em_train/prompts.py reads JSONL too, but loadtest and em_train may not import each other, and the ten lines that they
share do not justify a package for both.
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from loadtest.inputs import parse_json, read_text, shortened
from loadtest.scenario import FileTask, PresetTask, ScenarioError
from loadtest.tasks.base import LoadedTask, Question
from loadtest.tasks.checkers import build_checker
from loadtest.tasks.presets import QUESTION, FileFormat
from loadtest.tasks.rows import Row
from loadtest.tasks.text_checkers import TextChecker


def load_file(task: FileTask | PresetTask, file_format: FileFormat) -> LoadedTask:
    """Read the questions of a file.

    Raises:
        ScenarioError: if the file or its format is wrong; names the file, its line and the field.
    """
    if QUESTION not in file_format.prompt:
        raise ScenarioError(f"task.prompt: got {file_format.prompt!r}; must contain {QUESTION}")
    pattern = _compiled(file_format.pattern)
    checker = build_checker(file_format.checker, task.unsafe)
    try:
        rows = enumerate(islice(_rows(task.path), task.count))
        questions = [_question(index, place, row, file_format, pattern, checker) for index, (place, row) in rows]
    except ValueError as error:
        checker.close()
        raise ScenarioError(f"{task.path}: {error}") from None
    return LoadedTask(task.type, questions, checker)


def _compiled(pattern: str | None) -> re.Pattern[str]:
    try:
        return re.compile(r"(?s:.*)" if pattern is None else pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ScenarioError(f"task.answer_pattern: got {pattern!r}; {error}") from None


# ---- Rows


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the values of a JSONL file, or of one JSON array, each with its place ("line 3")."""
    text = read_text(path)
    rows = _array_items(text) if text.lstrip().startswith("[") else _lines(text)
    first = next(rows, None)
    if first is None:
        raise ScenarioError("line 1: the file is empty; must have a JSON object per line")
    yield first
    yield from rows


def _array_items(text: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(_parsed(text, "the array"), 1):
        yield f"item {number}", row


def _lines(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may contain U+2028 unescaped
        if line.strip():
            yield f"line {number}", _parsed(line, f"line {number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ScenarioError(f"{place}: is no JSON: {error}") from None


# ---- Questions


def _question(
    index: int, place: str, fields: Any, file_format: FileFormat, pattern: re.Pattern[str], checker: TextChecker
) -> Question:
    if not isinstance(fields, dict):
        raise ScenarioError(f"{place}: got {shortened(fields)}; must be a JSON object")
    row = Row(place, fields)
    _, text = file_format.question(row)
    answer_field, given = file_format.answer(row)
    found = pattern.search(given)
    answer = checker.normalize(found[1 if pattern.groups else 0] or "") if found else None
    if answer is None:
        no_match = f"nothing matches {file_format.pattern!r}"
        raise row.error(answer_field, f"is no answer for the checker {file_format.checker}" if found else no_match)
    return Question(index, file_format.prompt.replace(QUESTION, text), answer)
