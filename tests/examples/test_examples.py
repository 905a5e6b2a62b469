"""The scripts in examples/: what each must say, and the one that needs no vLLM. tests/engine/ runs the others."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 50  # of a script that a newcomer copies


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_a_script_is_short_and_says_how_to_run_it_and_what_it_prints(script: Path) -> None:
    source = script.read_text()
    docstring = ast.get_docstring(ast.parse(source)) or ""
    assert len(source.splitlines()) < MAX_LINES
    assert f".venv/bin/python examples/{script.name}" in docstring
    assert "\nPrints " in docstring


def test_every_script_is_run_by_a_test() -> None:
    tests = [Path(__file__), *(ROOT / "tests/engine").glob("test_*.py")]
    source = "".join(test.read_text() for test in tests)
    assert EXAMPLES
    assert [script.name for script in EXAMPLES if f'"{script.name}"' not in source] == []


def test_transformers_generate() -> None:
    """With the same seed, EM-INF changes which replies are sampled."""
    command = [sys.executable, str(ROOT / "examples" / "transformers_generate.py")]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain, minimised = done.stdout.splitlines()
    assert plain.startswith("em_inf=None: [('")
    assert minimised.startswith("em_inf=0.3: [('")
    assert minimised.split(": ", 1)[1] != plain.split(": ", 1)[1]
