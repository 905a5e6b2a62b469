"""Lines of JSON on disk: a question as requests.jsonl has it, written and read back. Knows nothing of runs."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from loadtest.inputs import parse_json
from loadtest.measurements import MeasuredQuestion
from loadtest.scenario import ScenarioError
from loadtest.storage import without_nan

_QUESTION = TypeAdapter(MeasuredQuestion)
_QUESTION_FIELDS = {field.name for field in fields(MeasuredQuestion)} - {"requests", "reply"}


def json_line(row: dict[str, Any]) -> str:
    """Return a row as a line of JSON; numbers that JSON does not have, of a server's strategy, become text."""
    try:
        return json.dumps(row, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(without_nan(row), allow_nan=False) + "\n"


def line_of(question: MeasuredQuestion) -> dict[str, Any]:
    """Return a question as requests.jsonl has it; `reply` is the position of the call whose reply the user gets."""
    calls = [dict(vars(request)) for request in question.requests]  # `asdict` takes longer than the rest: it copies
    for call in calls:
        del call["top_logprobs"]
    return {
        "index": question.index,
        "part": question.part,
        "scheduled": question.scheduled,
        "calls": calls,
        "reply": question.requests.index(question.reply) if question.reply else None,
        "answer": question.answer,
        "correct": question.correct,
        "problem": question.problem,
    }


def question_of(row: dict[str, Any]) -> MeasuredQuestion:
    """Return the question of a line, the inverse of `line_of`.

    Raises:
        ValueError: if a field is missing or wrong.
    """
    if "reply" not in row:  # null is a value: no request is complete
        raise ValueError("reply: is missing")
    known = {name: value for name, value in row.items() if name in _QUESTION_FIELDS}
    question = _QUESTION.validate_python(known | {"requests": row.get("calls")})
    reply = row["reply"]
    if reply is not None:
        if reply not in range(len(question.requests)):
            raise ValueError(f"reply: got {reply!r}; must be null or from 0 to {len(question.requests) - 1}")
        question.reply = question.requests[reply]
    return question


def append(path: Path, rows: Iterable[dict[str, Any]], durable: bool = True) -> None:
    """Append rows to a file, for whoever reads it if this process is killed next; if `durable`, if the machine is."""
    with path.open("a", encoding="ascii") as file:
        file.writelines(map(json_line, rows))
        file.flush()
        if durable:
            os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield a file's rows with their line numbers; none if there is no file.

    A last line without a line break is left out: its writer was killed while it wrote.

    Raises:
        ScenarioError: if another line is no JSON object; names the file and the line.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = parse_json(line)
            except ValueError as error:
                raise damaged(path, number, f"is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise damaged(path, number, "is no JSON object")
            yield number, row


def damaged(path: Path, line: int, problem: object) -> ScenarioError:
    """Make the error for a line that was not written by em-loadtest, or has changed since."""
    return ScenarioError(f"{path}: line {line}: {problem} (--restart begins anew)")
