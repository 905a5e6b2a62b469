"""Where a reply has its answer, and when two answers are equal.

Never evaluates what a model or a client wrote: computer algebra has no bound in time. What it does costs a bounded
number of steps: an answer is searched for in the end of a reply, and a client's pattern has limits (patterns.py).
"""

import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from answers.numbers import find_numbers, read_number, to_ascii
from answers.patterns import compile_pattern, last_match

MAX_PATTERN_CHARS = 1000
MAX_SEARCHED_CHARS = 20_000  # at the end of a reply
MAX_NESTED_COMMANDS = 3  # such as \text{\textbf{A}}

_BRACE = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\boxed\s*(?P<bare>[-\u2212]?\.?\d[\d.,/]*%?|[A-Z]\b)|\\[\\{}]|[{}]"
)
_DECORATION = re.compile(r"\\(?:left|right|displaystyle|[,;:! ])(?![A-Za-z])|\\?\$|~")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|textbf|textit|mathit|textrm|mathsf|texttt|emph|mbox)\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?([A-Z])\)")
_TRUTHS = frozenset(("Yes", "YES", "No", "NO", "True", "TRUE", "False", "FALSE"))


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
        return None if found is None else self.normal_form(found)

    def normal_form(self, value: str) -> str | None:
        """Return the normal form of an answer that stands alone; None if it is blank."""
        if self.type == "text":
            return (read_number(_plain(value)) if len(value) <= MAX_SEARCHED_CHARS else None) or value.strip() or None
        return _normal_form(value) or None

    def _find(self, reply: str) -> str | None:
        if self.type == "text":
            return reply
        if self.pattern is not None:
            return last_match(compile_pattern(self.pattern), reply)
        end = reply[-MAX_SEARCHED_CHARS:]
        return _last_box(end) if self.type == "boxed" else _last_number(end)


def after_thinking(reply: str) -> str:
    """Return the part of a reply that follows the model's thinking: after the last `</think>`, stripped."""
    return reply.rpartition("</think>")[2].strip()


def _last_box(reply: str) -> str | None:
    r"""Return the content of the last complete box that is not blank: `\boxed{42}` or `\boxed 42`. In linear time."""
    opened: list[int | None] = []  # where a box's content begins; None for other braces
    begin, end = -1, -1
    for brace in _BRACE.finditer(reply):
        if brace["bare"]:
            begin, end = brace.span("bare")
        elif brace["box"] or brace[0] == "{":
            opened.append(brace.end() if brace["box"] else None)
        elif brace[0] == "}" and opened and (start := opened.pop()) is not None and start > begin:
            blank = reply[start : brace.start()].isspace() or start == brace.start()
            begin, end = (begin, end) if blank else (start, brace.start())
    return reply[begin:end] if begin >= 0 else None


def _last_number(reply: str) -> str | None:
    """Return the last number; the fraction alone of what is no mixed number, such as `2 5/3`."""
    last = find_numbers(reply)[-1:]
    return next((part for text in last for part in (text, text.rpartition(" ")[2]) if read_number(_plain(part))), None)


def _normal_form(found: str) -> str:
    """Return a number's value; of other text, what changes its meaning."""
    text = _plain(found)
    number = read_number(text)
    if number is not None:
        return number
    joined = re.sub(r"\s*([^\w\s])\s*", r"\1", text).rstrip(".").strip()
    text = joined if read_number(joined) is None else text  # `1, 234` is no number
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text.lower() if text in _TRUTHS else text


def _plain(text: str) -> str:
    """Remove what changes a formula's appearance but not its meaning, and all spaces but single ones."""
    text = to_ascii(text)
    for _ in range(MAX_NESTED_COMMANDS):
        text = _TEXT_COMMAND.sub(r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", _DECORATION.sub("", text))
    return re.sub(r"\s+", " ", re.sub(r"\\([%&#_])", r"\1", text)).strip()
