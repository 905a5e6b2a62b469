"""What can be expected of vLLM's sources: one function for each kind of expectation."""

import ast
import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

from compat.sources import Def, MissingError, Sources, find, members


@dataclass(frozen=True)
class Check:
    """One expectation in words, and how to say the same of what a file of the sources has: a misfit if it differs."""

    expected: str
    actual: Callable[[Sources, str], str]  # may raise MissingError


def has(owner: str, *names: str) -> Check:
    """Attributes or methods that we use of a class."""

    def actual(sources: Sources, file: str) -> str:
        there = members(sources, find(sources, file, owner))
        return f"{owner}: {', '.join(name for name in names if name in there) or 'nothing'}"

    return Check(f"{owner}: {', '.join(names)}", actual)


def asks_for(owner: str, *names: str) -> Check:
    """What a class of ours has to have, and no more: the members of a protocol, the abstract ones of another class."""

    def actual(sources: Sources, file: str) -> str:
        found = find(sources, file, owner)
        protocol = "Protocol" in map(ast.unparse, getattr(found.node, "bases", ()))
        texts = {name: ast.unparse(member.node) for name, member in members(sources, found).items()}
        wanted = sorted(name for name, text in texts.items() if protocol or "@abstractmethod" in text)
        return f"{owner} asks for {', '.join(wanted) or 'nothing'}"

    return Check(f"{owner} asks for {', '.join(sorted(names))}", actual)


def signature(expected: str) -> Check:
    """A function or method that we call, or that vLLM calls and ours stands in for: exactly these parameters."""
    name = expected.partition("(")[0]

    def actual(sources: Sources, file: str) -> str:
        node = find(sources, file, name).node
        return f"{name}({_parameters(node)})" if isinstance(node, Def) else f"{name}, which is no function"

    return Check(expected, actual)


def value(name: str, expected: str) -> Check:
    """What is assigned to a global or a class attribute."""

    def actual(sources: Sources, file: str) -> str:
        assigned = getattr(find(sources, file, name).node, "value", None)
        return f"{name} = {ast.unparse(assigned) if assigned else 'nothing'}"

    return Check(f"{name} = {expected}", actual)


def contains(name: str, *pieces: str) -> Check:
    """Expressions, statements or keyword arguments in a definition, the first occurrence of each in this order."""

    def actual(sources: Sources, file: str) -> str:
        walked = ast.walk(find(sources, file, name).node)
        nodes = [node for node in walked if isinstance(node, ast.expr | ast.stmt | ast.keyword)]
        lines = {ast.unparse(node): node.lineno for node in sorted(nodes, key=lambda node: -node.lineno)}
        there = sorted((piece for piece in pieces if piece in lines), key=lines.__getitem__)
        return f"{name} with {', then '.join(there) or 'nothing'}"

    return Check(f"{name} with {', then '.join(pieces)}", actual)


def matches(pattern: str, *expected: str) -> Check:
    """All that a pattern finds in a file: these, and no other."""

    def actual(sources: Sources, file: str) -> str:
        there = sorted(re.findall(pattern, sources.text(file), re.MULTILINE))
        return f"{pattern} finds {', '.join(there) or 'nothing'}"

    return Check(f"{pattern} finds {', '.join(sorted(expected))}", actual)


def _parameters(function: Def) -> str:
    arguments = copy.deepcopy(function.args)
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(arguments)


@dataclass(frozen=True)
class Touch:
    """One place where a file of ours meets a file of vLLM's."""

    ours: str
    file: str  # as a wheel names it; a folder where our code copes with any module in it
    check: Check
    relied: str  # what we rely on

    def misfit(self, sources: Sources) -> str | None:
        """What these sources have instead of what is expected, as one line; None where they fit."""
        try:
            actual = self.check.actual(sources, self.file)
        except MissingError as missing:
            actual = str(missing)
        if actual == self.check.expected:
            return None
        return f"{self.file}: expected {self.check.expected}; found {actual} (used by {self.ours})"

    def row(self) -> str:
        """The line of the table in docs/vllm-surface.md."""
        return f"| `{self.ours}` | `{self.file}` | `{self.check.expected}` | {self.relied} |"
