"""What can be expected of vLLM's sources: a function for each kind of expectation. Knows nothing of our own files."""

import ast
import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

from compat.sources import Function, Sources, find, members


@dataclass(frozen=True)
class Expectation:
    """A statement about a file of vLLM, in words, and a function that words what the sources really have.

    If both texts are equal, the sources are as expected.
    """

    expected: str
    actual: Callable[[Sources, str], str]  # of the sources and a file; may raise MissingError


def has(owner: str, *names: str) -> Expectation:
    """Expect these attributes or methods, which we use, in a class."""

    def actual(sources: Sources, file: str) -> str:
        present = members(sources, find(sources, file, owner))
        return f"{owner}: {', '.join(name for name in names if name in present) or 'nothing'}"

    return Expectation(f"{owner}: {', '.join(names)}", actual)


def abstract_members(owner: str, *names: str) -> Expectation:
    """Expect exactly these members that our class must define: all of a protocol, or the abstract ones of a class."""

    def actual(sources: Sources, file: str) -> str:
        found = find(sources, file, owner)
        is_protocol = "Protocol" in map(ast.unparse, getattr(found.node, "bases", ()))
        texts = {name: ast.unparse(member.node) for name, member in members(sources, found).items()}
        required = sorted(name for name, text in texts.items() if is_protocol or "@abstractmethod" in text)
        return f"{owner} asks for {', '.join(required) or 'nothing'}"

    return Expectation(f"{owner} asks for {', '.join(sorted(names))}", actual)


def signature(expected: str) -> Expectation:
    """Expect exactly these parameters of a function that we call, or that vLLM calls and we implement or replace."""
    name = expected.partition("(")[0]

    def actual(sources: Sources, file: str) -> str:
        node = find(sources, file, name).node
        return f"{name}({_parameters(node)})" if isinstance(node, Function) else f"{name}, which is no function"

    return Expectation(expected, actual)


def value(name: str, expected: str) -> Expectation:
    """Expect this value of a global or a class attribute, as source text."""

    def actual(sources: Sources, file: str) -> str:
        assigned = getattr(find(sources, file, name).node, "value", None)
        return f"{name} = {ast.unparse(assigned) if assigned else 'nothing'}"

    return Expectation(f"{name} = {expected}", actual)


def contains(name: str, *pieces: str) -> Expectation:
    """Expect these expressions, statements or keyword arguments in a definition; their first occurrences in order."""

    def actual(sources: Sources, file: str) -> str:
        walked = ast.walk(find(sources, file, name).node)
        nodes = [node for node in walked if isinstance(node, ast.expr | ast.stmt | ast.keyword)]
        first_lines = {ast.unparse(node): node.lineno for node in sorted(nodes, key=lambda node: -node.lineno)}
        present = sorted((piece for piece in pieces if piece in first_lines), key=first_lines.__getitem__)
        return f"{name} with {', then '.join(present) or 'nothing'}"

    return Expectation(f"{name} with {', then '.join(pieces)}", actual)


def matches(pattern: str, *expected: str) -> Expectation:
    """Expect exactly these matches of a regular expression in a file."""

    def actual(sources: Sources, file: str) -> str:
        found = sorted(re.findall(pattern, sources.text(file), re.MULTILINE))
        return f"{pattern} finds {', '.join(found) or 'nothing'}"

    return Expectation(f"{pattern} finds {', '.join(sorted(expected))}", actual)


def _parameters(function: Function) -> str:
    arguments = copy.deepcopy(function.args)
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(arguments)
