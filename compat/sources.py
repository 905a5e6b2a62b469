"""The sources of one vLLM and the definitions in them, read by `ast`. Neither imports nor installs vLLM."""

import ast
import functools
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

DISTRIBUTION = re.compile(r"vllm(_cpu)?-.+\.dist-info")
METADATA = "*.dist-info/METADATA"  # the folder's real name carries the version

Function = ast.FunctionDef | ast.AsyncFunctionDef


class MissingError(Exception):
    """Something is not in the sources; the message names it."""


class Sources:
    """The files of a wheel, or of a folder that contains the package, such as site-packages."""

    def __init__(self, path: Path) -> None:
        self.root: Path | zipfile.Path = zipfile.Path(path) if path.is_file() else path
        folders = [each.name for each in self.root.iterdir() if DISTRIBUTION.fullmatch(each.name)]
        self.release = folders[0].removesuffix(".dist-info") if folders else path.name  # such as vllm-0.32.0
        self.trees: dict[str, ast.Module] = {}

    def has(self, file: str) -> bool:
        """Return whether there is such a file."""
        return (self.root / file).is_file()

    def text(self, file: str) -> str:
        """Return the file's text. A `*` in the name stands for the release.

        Raises:
            MissingError: if there is no such file.
        """
        file = file.replace("*", self.release)
        if not self.has(file):
            raise MissingError("no such file")
        return (self.root / file).read_text(encoding="utf-8")

    def tree(self, file: str) -> ast.Module:
        """Return the parsed file."""
        if file not in self.trees:
            self.trees[file] = ast.parse(self.text(file))
        return self.trees[file]

    def below(self, folder: str) -> list[str]:
        """Return the names of all Python files below `folder`."""
        if isinstance(self.root, Path):
            return [path.relative_to(self.root).as_posix() for path in (self.root / folder).rglob("*.py")]
        return [name for name in self.root.root.namelist() if name.startswith(f"{folder}/") and name.endswith(".py")]


@dataclass(frozen=True)
class Found:
    """A node that defines a name, and its file."""

    file: str
    node: ast.AST


def find(sources: Sources, file: str, dotted: str) -> Found:
    """Return what `dotted` names: a global or the path of a POST route, followed by `members`.

    Raises:
        MissingError: if one of the names is not there.
    """
    first, *rest = dotted.split(".")
    found = _item(_handlers(sources, file), first) if first.startswith("/") else _global(sources, file, first)
    for name in rest:
        found = _item(members(sources, found), name)
    return found


def members(sources: Sources, found: Found) -> dict[str, Found]:
    """Return what can follow after a dot, by name.

    Of a class: its attributes and methods, and those of its bases in vLLM. Of a function: its parameters. Of an
    attribute or a parameter: the members of the class that it is annotated with.
    """
    node = found.node
    if isinstance(node, Function):
        return {each.arg: Found(found.file, each) for each in node.args.args}
    if not isinstance(node, ast.ClassDef):
        return members(sources, _annotated(sources, found))
    inherited: dict[str, Found] = {}
    for base in reversed(node.bases):
        with suppress(MissingError):  # not vLLM's
            inherited |= members(sources, _global(sources, found.file, ast.unparse(base)))
    return inherited | {name: Found(found.file, each) for each in node.body for name in _defines(each)}


def _item(named: dict[str, Found], name: str) -> Found:
    if name not in named:
        raise MissingError(f"no {name}")
    return named[name]


def _global(sources: Sources, file: str, name: str) -> Found:
    """Find the definition of a module's `name`; follow imports as long as they stay inside vLLM."""
    for node in _statements(sources.tree(file)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name and (module := _module(sources, file, node)):
                    return _global(sources, module, alias.name)
        elif name in _defines(node):
            return Found(file, node)
    raise MissingError(f"no {name}")


def _annotated(sources: Sources, found: Found) -> Found:
    annotation = getattr(found.node, "annotation", None)
    text = ast.unparse(annotation) if annotation else ""
    for name in re.findall(r"\w+", text):
        with suppress(MissingError):  # None, Optional
            target = _global(sources, found.file, name)
            if isinstance(target.node, ast.ClassDef):
                return target
    raise MissingError(f"no class of vLLM's in the annotation {text!r}")


@functools.cache
def _handlers(sources: Sources, folder: str) -> dict[str, Found]:
    """Return the functions of all POST routes that modules in `folder` declare with a literal path, by path."""
    return {
        str(call.args[0].value): Found(file, node)
        for file in sources.below(folder)
        if ".post(" in sources.text(file)
        for node in ast.walk(sources.tree(file))
        for call in getattr(node, "decorator_list", ())
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".post")
        if call.args and isinstance(call.args[0], ast.Constant)
    }


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements at module level, and those below `if TYPE_CHECKING` and `try`."""
    for each in ast.iter_child_nodes(node):
        yield each
        if isinstance(each, ast.If | ast.Try | ast.ExceptHandler):
            yield from _statements(each)


def _defines(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef | Function):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _module(sources: Sources, file: str, node: ast.ImportFrom) -> str | None:
    package = file.split("/")[: -node.level] if node.level else []
    base = "/".join([*package, *(node.module or "").split(".")]).rstrip("/")
    return next(filter(sources.has, (f"{base}.py", f"{base}/__init__.py")), None)
