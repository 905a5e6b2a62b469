"""The load generator in an environment with only what `em-inf-server[loadtest]` requires.

The environment is built from the distributions that are installed here; nothing is downloaded.
"""

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.loadtest.mock_server import serve

ROOT = Path(__file__).parents[2]
OURS = ("em_sampler", "em_train", "server")


def own_requirements(extra: str) -> list[Requirement]:
    """Return the project's base requirements and those of an extra.

    From pyproject.toml: the metadata of an editable install may be older.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"][extra]]


def closure(requirements: Iterable[Requirement]) -> dict[str, metadata.Distribution]:
    """Return the installed distributions that the requirements need, directly or not, by name."""
    found: dict[str, metadata.Distribution] = {}
    done: set[tuple[str, str]] = set()
    pending = list(requirements)
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        found[name] = metadata.distribution(name)
        for extra in {"", *requirement.extras}:
            if (name, extra) not in done:
                done.add((name, extra))
                needed = [Requirement(text) for text in found[name].requires or ()]
                pending += [one for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})]
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the environment."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for distribution in closure(own_requirements("loadtest")).values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = site_packages / top
            if not link.is_symlink():  # two distributions may share a namespace package
                link.symlink_to(Path(str(distribution.locate_file(top))).resolve())
    (site_packages / "em_inf_server.pth").write_text(f"{ROOT}\n")
    return folder / "bin" / "python"


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter in a folder, without environment variables that could add packages."""
    return subprocess.run([python, *arguments], cwd=folder, env={}, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("module", ["torch", "zmq", "vllm", "fastapi", "numba", "prometheus_client"])
def test_what_only_the_server_needs_is_not_installed(python: Path, tmp_path: Path, module: str) -> None:
    result = run(python, tmp_path, "-c", f"import {module}")
    assert f"No module named '{module}'" in result.stderr


def test_the_command_is_imported_without_our_other_packages(python: Path, tmp_path: Path) -> None:
    code = "import json, sys, loadtest.cli; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    result = run(python, tmp_path, "-c", code)
    assert result.returncode == 0, result.stderr
    imported = json.loads(result.stdout)
    assert "loadtest" in imported and not set(OURS) & set(imported)


def test_the_command_prints_its_help(python: Path, tmp_path: Path) -> None:
    result = run(python, tmp_path, "-m", "loadtest.cli", "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: em-loadtest")


def test_a_run_writes_a_report(python: Path, tmp_path: Path) -> None:
    scenario = {
        "name": "tiny",
        "task": {"type": "demo", "count": 4},
        "arms": {"a": None},
        "loads": [{"type": "closed", "concurrency": 2}],
        "repetitions": 1,
        "warmup": 0,
        "limits": {"lag_ms": 1e6},  # how fast the machine is does not matter here
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(scenario))
    with serve(tokens=3) as served:
        result = run(
            python, tmp_path, "-m", "loadtest.cli", "run", "tiny.yaml", "--base-url", served.url, "--out", "out"
        )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["arms"][0]["accuracy"]["value"] == 1
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
