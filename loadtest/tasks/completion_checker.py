"""Checks replies that complete a function, as HumanEval asks: the whole function, or only its body.

Knows code as text alone: a stranger's code is not even parsed in this process.
"""

import json
import re
import textwrap
from dataclasses import asdict, dataclass

from loadtest.tasks.code_checker import CodeChecker

INDENT = "    "

_FUTURE = re.compile(r"^from __future__ import .*", re.MULTILINE)  # Python wants it before all else
_COMMENT = re.compile(r"\s*#.*")


@dataclass(frozen=True)
class Completion:
    """A function to complete, and the unit tests for it. As JSON it is the answer of a question."""

    stub: str  # imports and helper functions, then the function's first lines
    entry_point: str  # its name
    tests: str

    def to_json(self) -> str:
        """Return it as text, for `CompletionChecker.normalize`."""
        return json.dumps(asdict(self))

    def program(self, code: str) -> str:
        """Return the stub with a reply's code: a body ends it; definitions follow it, and replace those that it has."""
        code = textwrap.dedent(code)
        name = re.escape(self.entry_point)
        if not re.search(rf"^(?:async +)?def +{name}\b|^{name} *= *lambda\b", code, re.MULTILINE):
            return f"{self.stub.rstrip()}\n{_as_body(code)}\n"
        stub = f"{self.stub.rstrip()}\n{INDENT}pass\n"
        return "\n".join([*_FUTURE.findall(code), stub, _FUTURE.sub("", code)])


class CompletionChecker(CodeChecker):
    """Runs the function that a reply completes, then its unit tests."""

    def normalize(self, given: str) -> str | None:
        """Return a `Completion` as JSON, unchanged; None if its unit tests are not Python."""
        return given if super().normalize(Completion(**json.loads(given)).tests) is not None else None

    def files(self, code: str, expected: str) -> tuple[str, str]:
        """Return the completed function and its unit tests."""
        completion = Completion(**json.loads(expected))
        return completion.program(code), completion.tests


def _as_body(code: str) -> str:
    """Indent statements as the body of a function."""
    first, *rest = code.strip("\n").split("\n")
    if _has_lost_indent(first, [len(line) - len(line.lstrip()) for line in rest if line.strip()]):
        return "\n".join([INDENT + first, *rest])
    return textwrap.indent("\n".join([first, *rest]), INDENT)


def _has_lost_indent(first: str, others: list[int]) -> bool:
    """Return whether only the first line of a body is not indented, as in text whose ends were stripped.

    Lines below it may be indented for another reason: it opens a block or a bracket. The second line is then as deep
    as the block, and none is less deep.
    """
    if not others or min(others) == 0 or first[:1].isspace():
        return False
    opens = _COMMENT.sub("", first).rstrip().endswith((":", ",", "(", "[", "{", "\\"))
    return not opens or others[0] > min(others)
