"""Reads what others wrote, files and JSON: any content gives a value, or a ValueError that says what is wrong."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 256 << 20
MAX_DEPTH = 64  # of JSON and YAML: Python's own functions end deep nesting with a RecursionError
MAX_SHOWN = 80  # characters of a value in an error


def read_text(path: Path, max_bytes: int = MAX_FILE_BYTES) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: if it cannot be read, is larger than `max_bytes` or is no UTF-8; says so without the path.
    """
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(error.strerror) from None
    if len(content) > max_bytes:
        raise ValueError(f"is larger than {max_bytes >> 20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is no UTF-8 at byte {error.start}") from None


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. NaN and Infinity, which Python writes but JSON does not have, become None.

    Raises:
        ValueError: if it is no JSON, or nested deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, brackets)) > MAX_DEPTH:  # type: ignore[arg-type]  # of the same type as the text
        _check_depth(value)
    return value


def _check_depth(value: object) -> None:
    """Raise if a value is nested too deep; goes down level by level, as recursion would meet its own limit."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = list(chain.from_iterable(map(_children, level)))
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _children(value: object) -> list[object]:
    """Return the containers inside a container."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [one for one in inside if isinstance(one, dict | list)]


def shortened(value: object) -> str:
    """Return a value as an error shows it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a list that contains itself many times
        return f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def one_line(text: object) -> str:
    """Return text without line breaks and without characters that control a terminal."""
    return printable(" ".join(str(text).split()))


def printable(text: str) -> str:
    """Return text with an escape sequence for each character that controls a terminal."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
