"""Loads tasks and checks replies, for tests of the modules that make questions."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from loadtest.scenario import Task
from loadtest.tasks.base import LoadedTask
from loadtest.tasks.registry import load_task


@contextmanager
def loaded(**task: Any) -> Iterator[LoadedTask]:
    """Load a task from the fields of a scenario, and close it when the block ends."""
    loaded_task = load_task(TypeAdapter(Task).validate_python(task))
    try:
        yield loaded_task
    finally:
        loaded_task.close()


def write_file(folder: Path, *rows: Any) -> Path:
    """Write a JSONL file of values, or of lines that are text."""
    path = folder / "questions.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def check(task: LoadedTask, *replies: str) -> list[bool | None]:
    """Return whether each reply answers the first question."""

    async def check_all() -> list[bool | None]:
        verdicts = await asyncio.gather(*(task.check(task.questions[0], reply) for reply in replies))
        return [verdict.correct if verdict else None for verdict in verdicts]

    return asyncio.run(check_all())
