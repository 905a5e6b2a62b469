"""Prompts from a JSONL file or a Hugging Face dataset. Knows nothing of models; what is wrong names its line."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHOWN = 80  # characters of a value in an error


class InputError(ValueError):
    """What was asked for cannot be done; the text says which field, which value, and what would do."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        content: text (one user turn, or the bare beginning of a text), or the turns of a chat.
        answer: the right answer, where the data has one. Only held-out scores and the labelled reference look at it.
    """

    content: str | list[dict[str, str]]
    answer: str | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as a chat."""
        return [{"role": "user", "content": self.content}] if isinstance(self.content, str) else self.content

    @property
    def key(self) -> str:
        """Equal prompts have equal keys."""
        return hashlib.sha256(json.dumps(self.content, ensure_ascii=False).encode()).hexdigest()[:16]


def read_prompts(source: str, column: str = "prompt", split: str = "train", limit: int | None = None) -> list[Prompt]:
    """Distinct prompts, in the order of the data.

    Args:
        source: a JSONL file with a `column` of text or chat turns and perhaps an `answer`; else a dataset of that name
            or folder, which `datasets.load_dataset` finds.

    Raises:
        InputError: the data cannot be read, a row is malformed, or there is none.
    """
    found: dict[str, Prompt] = {}
    rows = read_jsonl(Path(source)) if Path(source).is_file() else _dataset(source, split)
    for where, row in rows:
        prompt = _prompt(row, column, f"{source}: {where}")
        found.setdefault(prompt.key, prompt)
        if len(found) == limit:
            break
    if not found:
        raise InputError(f"{source}: has no rows")
    return list(found.values())


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place ("line 3").

    Raises:
        InputError: a line is no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold U+2028 as it is
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number}: is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number}: got {_short(row)}; must be a JSON object")
        yield f"line {number}", row


def _dataset(name: str, split: str) -> Iterable[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"--prompts: {name!r} is no file, and no dataset that loads: {reason}") from None
    return ((f"row {index}", row) for index, row in enumerate(data))


def _prompt(row: dict[str, Any], column: str, where: str) -> Prompt:
    if column not in row:
        raise InputError(f"{where}: has no field {column!r}; has {', '.join(row) or 'none'}")
    content, answer = row[column], row.get("answer")
    if isinstance(content, list):
        content = [_turn(turn, f"{where}: {column}") for turn in content]
    if not content or not isinstance(content, str | list) or (isinstance(content, str) and not content.strip()):
        raise InputError(f"{where}: {column}: got {_short(row[column])}; must be text or a list of chat turns")
    return Prompt(content, None if answer is None else str(answer))


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
        raise InputError(f'{where}: got {_short(turn)}; a turn must be {{"role": ..., "content": ...}}, both text')
    return {"role": turn["role"], "content": turn["content"]}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
