"""The answer in a reply, and when two answers are the same. Knows text alone.

Nothing here evaluates what a model wrote: no computer algebra (its time has no bound on hostile input), no `re` for a
client's pattern (RE2's time is linear in the text).
"""

import re
from collections import deque
from fractions import Fraction
from typing import Any, Literal, Self

import re2
from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_PATTERN = 1000  # characters
MAX_DIGITS = 100  # of a number that is compared by value; longer ones are compared as text
DECIMALS = 6  # at most, of a number that is written with a point; others are written as fractions
PATTERN_MEMORY = 1 << 20  # bytes that RE2 may use for one pattern

_NUMBER = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d*))?(?:[eE]([-+]?\d{1,2}))?")
_RATIO = re.compile(r"([-+]?)(?:\\frac\{([^{}]*)\}\{([^{}]*)\}|\\frac(\d)(\d)|([^/{}]+)/([^/{}]+))")
# A sign counts where it is none of subtraction: at the start, after a space, a bracket or another sign.
_IN_TEXT = re.compile(r"(?:(?<![\w)\]}.%])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+(?!\.?\d))?")
_BRACE = re.compile(r"\\boxed\{|[{}]")
_DECORATION = re.compile(r"\\(?:left|right|displaystyle|[,;:! ])|\$|~")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")


class Answer(BaseModel):
    """How to find the answer in a reply."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["boxed", "regex", "last_number", "text"] = Field(
        default="boxed",
        description="boxed: in the last \\boxed{...}. regex: the first group of the last match of `pattern`. "
        "last_number. text: the whole reply.",
    )
    pattern: str | None = Field(
        default=None, min_length=1, max_length=MAX_PATTERN, description="For regex, in RE2's syntax."
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "regex" and self.pattern is None:
            raise ValueError("type regex needs a `pattern`")
        if self.pattern is not None and self.type != "regex":
            raise ValueError(f"`pattern` is for type regex; got type {self.type}")
        if self.pattern is not None:
            try:
                _compiled(self.pattern)
            except re2.error as error:
                text = error.args[0].decode() if isinstance(error.args[0], bytes) else error.args[0]
                raise ValueError(f"`pattern` is not in RE2's syntax: {text}") from None
        return self

    def of(self, reply: str) -> str | None:
        """The answer in its normal form: replies with equal answers give equal strings. None where there is none."""
        found = self._found(after_thinking(reply))
        if found is None or not found.strip():
            return None
        return _value(found) or (found.strip() if self.type == "text" else _plain(found)) or None

    def _found(self, reply: str) -> str | None:
        if self.type == "boxed":
            return _last_box(reply)
        if self.type == "text":
            return reply
        pattern = _IN_TEXT if self.pattern is None else _compiled(self.pattern)
        last = deque(pattern.finditer(reply), maxlen=1)
        found: str | None = last[0].group(1 if pattern.groups else 0) if last else None
        return found


def after_thinking(reply: str) -> str:
    """What a model that thinks first says after it."""
    return reply.rpartition("</think>")[2].strip()


def _compiled(pattern: str) -> Any:
    options = re2.Options()
    options.max_mem = PATTERN_MEMORY
    options.log_errors = False
    return re2.compile(pattern, options)


def _last_box(reply: str) -> str | None:
    """The content of the last complete `\\boxed{...}`, braces inside it balanced. Time is linear."""
    opened: list[int | None] = []  # where a box's content begins; None for other braces
    begin, end = -1, -1
    for brace in _BRACE.finditer(reply):
        if brace[0] != "}":
            opened.append(brace.end() if len(brace[0]) > 1 else None)
        elif opened and (start := opened.pop()) is not None and start > begin:
            begin, end = start, brace.start()
    return reply[begin:end] if begin >= 0 else None


def _plain(text: str) -> str:
    """Without what changes a formula's looks and not its meaning."""
    text = _WRAPPED.sub(r"\1", _DECORATION.sub("", text))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"\s+", " ", text))
    return text.strip().rstrip(".")


def _value(text: str) -> str | None:
    """A number's value, exactly: `0.50`, `1/2` and `\\frac{1}{2}` are all `0.5`."""
    if len(text) > 4 * MAX_DIGITS:
        return None
    text = _plain(text).replace(" ", "")
    ratio = _RATIO.fullmatch(text)
    parts = [_number(part) for part in ratio.groups()[1:] if part is not None] if ratio else [_number(text)]
    if None in parts or (len(parts) > 1 and not parts[1]):
        return None
    value = Fraction(parts[0]) / (parts[1] if len(parts) > 1 else 1)  # type: ignore[operator, arg-type]
    return _written(-value if ratio and ratio[1] == "-" else value)


def _written(value: Fraction) -> str:
    if 10**DECIMALS % value.denominator:
        return str(value)  # such as 1/3
    digits = f"{abs(value.numerator) * (10**DECIMALS // value.denominator):0{DECIMALS + 1}d}"
    sign = "-" if value < 0 else ""
    return f"{sign}{digits[:-DECIMALS]}.{digits[-DECIMALS:]}".rstrip("0").rstrip(".")


def _number(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    if not match or len(text) > MAX_DIGITS or not (match[2] or match[3]):
        return None
    whole, decimals = match[2].replace(",", ""), match[3] or ""
    power = int(match[4] or 0) - len(decimals)
    return int(f"{match[1]}{whole}{decimals}") * Fraction(10) ** power
