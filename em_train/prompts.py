"""Prompts from a JSONL file or a Hugging Face dataset. Knows nothing of models; an error names the line or row."""

import hashlib
import json
from collections.abc import Iterator
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


def read_prompts(
    source: str, column: str = "prompt", split: str = "train", limit: int | None = None, flag: str = "--prompts"
) -> list[Prompt]:
    """Return the distinct prompts of `source`, in the order of the data.

    Args:
        source: a JSONL file with text or chat turns in `column` and optionally an `answer`; otherwise the name or
            folder of a dataset, as `datasets.load_dataset` takes it.
        column: the field that holds the prompt.
        split: the split of a dataset.
        limit: the most distinct prompts to return.
        flag: the setting that an error names.

    Raises:
        InputError: if the data cannot be read, has no rows, or a row is malformed.
    """
    found: dict[str, Prompt] = {}
    rows = read_jsonl(Path(source)) if Path(source).is_file() else _load_dataset(source, split, flag)
    for place, row in rows:
        prompt = parse_prompt(row, column, f"{source}: {place}")
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
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()  # refuses half of a surrogate pair, which is no text
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number}: is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number}: got {shorten(row)}; must be a JSON object")
        yield f"line {number}", row


def _load_dataset(name: str, split: str, flag: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        for index, row in enumerate(datasets.load_dataset(name, split=split)):
            yield f"row {index}", row
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{flag}: {name!r} is no file, and no dataset that loads: {reason}") from None


def parse_prompt(row: dict[str, Any], column: str, place: str) -> Prompt:
    """Return the prompt in a field of a row, with the row's `answer`.

    Raises:
        InputError: if there is none; begins with `place`.
    """
    if column not in row:
        raise InputError(f"{place}: has no field {column!r}; has {', '.join(row) or 'none'}")
    content, answer = row[column], row.get("answer")
    if isinstance(content, list):
        content = [_parse_turn(turn, f"{place}: {column}") for turn in content]
    if not content or not isinstance(content, str | list) or (isinstance(content, str) and not content.strip()):
        raise InputError(f"{place}: {column}: got {shorten(row[column])}; must be text or a list of chat turns")
    return Prompt(content, None if answer is None else str(answer))


def _parse_turn(turn: Any, place: str) -> dict[str, str]:
    if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
        raise InputError(f'{place}: got {shorten(turn)}; a turn must be {{"role": ..., "content": ...}}, both text')
    return {"role": turn["role"], "content": turn["content"]}


def shorten(value: object) -> str:
    """Return a value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."
