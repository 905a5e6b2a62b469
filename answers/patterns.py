"""A client's pattern and its last match, at a bounded cost whatever the pattern and the text are.

RE2 never backtracks, but one search may read all of the text at the cost of every instruction of the pattern, and the
last of n matches takes n searches. So size, text and searches are all limited.
"""

from itertools import islice
from typing import Any

import re2

MAX_INSTRUCTIONS = 300  # ordinary patterns have 10 to 70
MAX_GROUPS = 10  # RE2 copies the places of all groups with every step
MAX_STEPS = 3_000_000  # instructions times bytes, for the searches in one window
WINDOWS = (20_000, 2_000, 200)  # bytes at the end of a text
_MEMORY_BYTES = 1 << 18  # RE2's limit for one pattern


def compile_pattern(pattern: str) -> Any:
    """Compile a pattern in RE2's syntax.

    Raises:
        ValueError: if it is not in RE2's syntax, or too large.
    """
    options = re2.Options()
    options.max_mem = _MEMORY_BYTES
    options.log_errors = False
    try:
        compiled = re2.compile(pattern, options)
    except UnicodeEncodeError:
        raise ValueError("`pattern` is no valid Unicode text") from None
    except re2.error as error:
        text = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error.args[0]
        if "too large" in text:
            raise ValueError(f"`pattern` is too large: at most {MAX_INSTRUCTIONS} instructions of RE2") from None
        raise ValueError(f"`pattern` is not in RE2's syntax: {text}") from None
    if _size(compiled) > MAX_INSTRUCTIONS:
        raise ValueError(f"`pattern` is too large: {_size(compiled)} instructions of RE2, at most {MAX_INSTRUCTIONS}")
    if compiled.groups > MAX_GROUPS:
        raise ValueError(f"`pattern` has {compiled.groups} groups, at most {MAX_GROUPS}: write others as (?:...)")
    return compiled


def last_match(compiled: Any, text: str) -> str | None:
    """Return the first group of the last match, or the complete match if there is no group; None without a match.

    Only the end of a text is searched, the largest window first. If the searches that its size allows do not exhaust
    it, the next search begins in the next smaller window, or after the last match if that is later.
    """
    encoded = text.encode(errors="replace")
    last = None
    for window in WINDOWS:
        start = max(len(encoded) - window, last.end() if last else 0)
        searches = MAX_STEPS // (_size(compiled) * max(len(encoded) - start, 1)) + 1
        matches = list(islice(compiled.finditer(encoded, start), searches))
        last = matches[-1] if matches else last
        if len(matches) < searches:
            break
    found: bytes | None = last.group(1 if compiled.groups else 0) if last else None
    return None if found is None else found.decode(errors="replace")


def _size(compiled: Any) -> int:
    """Return the number of instructions; RE2 may read a text in both directions."""
    return int(max(compiled.programsize, compiled.reverseprogramsize))
