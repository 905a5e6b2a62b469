"""The documentation against the code: links, the files and names of the main path, the glossary's and README's size."""

import ast
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parent.parent
HOW_IT_WORKS = ROOT / "docs/how-it-works.md"
LINK = re.compile(r"\]\(([^)\s]+)\)")
STOP = re.compile(r"^\| (\d) \| \[([^\]]+)\]\([^)]+\) \| `(\w+)` \|", re.MULTILINE)


def pages() -> list[Path]:
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in tracked.stdout.split()]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def stops(section: str) -> list[tuple[str, str]]:
    """The (file, name) pairs of a section's table, in order."""
    text = HOW_IT_WORKS.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    found = STOP.findall(text)
    assert [int(number) for number, _, _ in found] == [*range(1, len(found) + 1)]
    return [(file, name) for _, file, name in found]


def module(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


WAY_IN, WAY_BACK = stops("The way of `threshold` to the kernel"), stops("The way of the entropies back")


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`(?!\])", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(prose):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


@pytest.mark.parametrize("way", [WAY_IN, WAY_BACK], ids=["in", "back"])
def test_each_way_has_at_most_eight_files(way: list[tuple[str, str]]) -> None:
    assert 2 <= len(way) == len(set(way)) <= 8


@pytest.mark.parametrize(("file", "name"), [*WAY_IN, *WAY_BACK])
def test_the_files_and_names_of_the_main_path_exist(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert name in {node.name for node in tree.body if isinstance(node, definitions)}


def test_each_file_of_the_way_in_is_a_floor_lower_than_the_last() -> None:
    graph = grimp.build_graph("server", "em_sampler", "answers", "demo", exclude_type_checking_imports=True)
    modules = [module(file) for file, _ in WAY_IN]
    for upper, lower in pairwise(modules):
        assert upper not in graph.find_upstream_modules(lower), f"{lower} imports {upper}"


def test_the_picture_names_files_that_exist() -> None:
    picture = HOW_IT_WORKS.read_text().split("```mermaid\n")[1].split("```")[0]
    files = re.findall(r"[\w/]+\.py", picture)
    assert {"server/endpoints.py", "server/handler.py", "server/engine.py", "server/response.py"} <= set(files)
    folders = [ROOT, ROOT / "em_sampler/vllm_plugin", ROOT / "em_sampler/transforms"]
    assert [file for file in files if not any((folder / file).exists() for folder in folders)] == []


def test_the_glossary_has_at_most_25_terms() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", HOW_IT_WORKS.read_text().split("## Glossary")[1], re.MULTILINE)
    terms = rows[2:]  # less the heading and the rule
    assert 10 <= len(terms) == len(set(terms)) <= 25


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    listed = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in LINK.findall(index)}
    assert {page for page in (ROOT / "docs").rglob("*.md") if page.name != "README.md"} <= listed
