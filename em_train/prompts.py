"""Prompts from a JSONL file or a Hugging Face dataset. Knows nothing of models; an error names the line or row."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_SHOWN_CHARS = 80  # of a value in an error message


class InputError(ValueError):
    """A setting, file or server that cannot be used; the text names the field, the value and what is allowed."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        content: text (one user turn, or the beginning of a text to complete), or the turns of a chat.
        answer: the right answer, if the data has one. Only held-out scores and the labelled reference use it.
    """

    content: str | list[dict[str, str]]
    answer: str | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as chat turns."""
        return [{"role": "user", "content": self.content}] if isinstance(self.content, str) else self.content

    @property
    def key(self) -> str:
        """A hash of the content: equal prompts have equal keys."""
        return hashlib.sha256(json.dumps(self.content, ensure_ascii=False).encode()).hexdigest()[:16]


def read_prompts(source: str, column: str = "prompt", split: str = "train", limit: int | None = None) -> list[Prompt]:
    """Return the distinct prompts of `source`, in the order of the data.

    Args:
        source: a JSONL file with text or chat turns in `column` and optionally an `answer`; otherwise the name or
            folder of a dataset, as `datasets.load_dataset` takes it.
        column: the field that holds the prompt.
        split: the split of a dataset.
        limit: the most distinct prompts to return.

    Raises:
        InputError: if the data cannot be read, has no rows, or a row is malformed.
    """
    found: dict[str, Prompt] = {}
    rows = read_jsonl(Path(source)) if Path(source).is_file() else _load_dataset(source, split)
    for place, row in rows:
        prompt = _parse_prompt(row, column, f"{source}: {place}")
        found.setdefault(prompt.key, prompt)
        if len(found) == limit:
            break
    if not found:
        raise InputError(f"{source}: has no rows")
    return list(found.values())


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSONL file, each with its place ("line 3").

    Raises:
        InputError: if the file cannot be read, or a line is not a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may contain U+2028 unescaped
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number}: is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number}: got {_shorten(row)}; must be a JSON object")
        yield f"line {number}", row


def _load_dataset(name: str, split: str) -> Iterable[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"--prompts: {name!r} is no file, and no dataset that loads: {reason}") from None
    return ((f"row {index}", row) for index, row in enumerate(data))


def _parse_prompt(row: dict[str, Any], column: str, place: str) -> Prompt:
    if column not in row:
        raise InputError(f"{place}: has no field {column!r}; has {', '.join(row) or 'none'}")
    content, answer = row[column], row.get("answer")
    if isinstance(content, list):
        content = [_parse_turn(turn, f"{place}: {column}") for turn in content]
    if not content or not isinstance(content, str | list) or (isinstance(content, str) and not content.strip()):
        raise InputError(f"{place}: {column}: got {_shorten(row[column])}; must be text or a list of chat turns")
    return Prompt(content, None if answer is None else str(answer))


def _parse_turn(turn: Any, place: str) -> dict[str, str]:
    if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
        raise InputError(f'{place}: got {_shorten(turn)}; a turn must be {{"role": ..., "content": ...}}, both text')
    return {"role": turn["role"], "content": turn["content"]}


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."
