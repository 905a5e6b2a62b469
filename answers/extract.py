"""Where a reply has its answer, and when two answers are equal.

Never evaluates what a model or a client wrote: computer algebra has no bound in time. What it does costs a bounded
number of steps: an answer is searched for in the end of a reply, and a client's pattern has limits (patterns.py).
"""

import re
from fractions import Fraction
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from answers.patterns import compile_pattern, last_match

MAX_PATTERN_CHARS = 1000
MAX_SEARCHED_CHARS = 20_000  # at the end of a reply
MAX_DIGITS = 100  # characters of a number that is compared by value; a longer one is compared as text
MAX_DECIMALS = 6  # a value with more decimals is written as a fraction, such as 1/3

_NUMBER = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d*))?(?:[eE]([-+]?\d{1,2}))?")
_FRACTION = re.compile(r"([-+]?)(?:\\frac\{([^{}]*)\}\{([^{}]*)\}|\\frac(\d)(\d)|([^/{}]+)/([^/{}]+))")
# A sign belongs to the number unless it is a subtraction: at the start, after a space, an open bracket or another sign.
_NUMBER_IN_TEXT = re.compile(r"(?:(?<![\w)\]}.%])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+(?!\.?\d))?")
_BRACE = re.compile(r"\\boxed\{|[{}]")
_DECORATION = re.compile(r"\\(?:left|right|displaystyle|[,;:! ])|\$|~")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")


class Answer(BaseModel):
    """How to find the answer in a reply."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["boxed", "regex", "last_number", "text"] = Field(
        default="boxed",
        description="boxed: in the last \\boxed{...}. regex: the first group of the last match of `pattern`. "
        "last_number: the last number. text: the complete reply.",
    )
    pattern: str | None = Field(
        default=None, min_length=1, max_length=MAX_PATTERN_CHARS, description="For regex, in RE2's syntax."
    )

    @model_validator(mode="after")
    def _check_pattern(self) -> Self:
        if self.type == "regex" and self.pattern is None:
            raise ValueError("type regex needs a `pattern`")
        if self.pattern is not None and self.type != "regex":
            raise ValueError(f"`pattern` is for type regex; got type {self.type}")
        if self.pattern is not None:
            compile_pattern(self.pattern)
        return self

    def extract(self, reply: str) -> str | None:
        """Return the reply's answer in normal form, or None if it has none. Equal answers give equal strings."""
        found = self._find(after_thinking(reply))
        if found is None or not found.strip():
            return None
        return _number_value(found) or (found.strip() if self.type == "text" else _without_decoration(found)) or None

    def _find(self, reply: str) -> str | None:
        if self.type == "text":
            return reply
        if self.pattern is not None:
            return last_match(compile_pattern(self.pattern), reply)
        end = reply[-MAX_SEARCHED_CHARS:]
        return _last_box(end) if self.type == "boxed" else next(iter(_NUMBER_IN_TEXT.findall(end)[::-1]), None)


def after_thinking(reply: str) -> str:
    """Return the part of a reply that follows the model's thinking: after the last `</think>`, stripped."""
    return reply.rpartition("</think>")[2].strip()


def _last_box(reply: str) -> str | None:
    r"""Return the content of the last complete `\boxed{...}` with balanced braces. Takes linear time."""
    opened: list[int | None] = []  # where a box's content begins; None for other braces
    begin, end = -1, -1
    for brace in _BRACE.finditer(reply):
        if brace[0] != "}":
            opened.append(brace.end() if len(brace[0]) > 1 else None)
        elif opened and (start := opened.pop()) is not None and start > begin:
            begin, end = start, brace.start()
    return reply[begin:end] if begin >= 0 else None


def _without_decoration(text: str) -> str:
    """Remove what changes a formula's appearance but not its meaning."""
    text = _TEXT_COMMAND.sub(r"\1", _DECORATION.sub("", text))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"\s+", " ", text))
    return text.strip().rstrip(".")


def _number_value(text: str) -> str | None:
    r"""Return a number's exact value, None for other text: `0.50`, `1/2` and `\frac{1}{2}` all give `0.5`."""
    if len(text) > 4 * MAX_DIGITS:
        return None
    text = _without_decoration(text).replace(" ", "")
    fraction = _FRACTION.fullmatch(text)
    parts = [part for part in fraction.groups()[1:] if part is not None] if fraction else [text, "1"]
    numerator, denominator = (_parse_number(part) for part in parts)
    if numerator is None or not denominator:
        return None
    value = numerator / denominator
    return _format(-value if fraction and fraction[1] == "-" else value)


def _format(value: Fraction) -> str:
    if 10**MAX_DECIMALS % value.denominator:
        return str(value)  # such as 1/3
    digits = f"{abs(value.numerator) * (10**MAX_DECIMALS // value.denominator):0{MAX_DECIMALS + 1}d}"
    sign = "-" if value < 0 else ""
    return f"{sign}{digits[:-MAX_DECIMALS]}.{digits[-MAX_DECIMALS:]}".rstrip("0").rstrip(".")


def _parse_number(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    if not match or len(text) > MAX_DIGITS or not (match[2] or match[3]):
        return None
    integer, decimals = match[2].replace(",", ""), match[3] or ""
    power = int(match[4] or 0) - len(decimals)
    return int(f"{match[1]}{integer}{decimals}") * Fraction(10) ** power
