"""benchmarks/gpu.sh with a program in Python's place: what fails stops nothing, is listed, and is the exit status."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
PYTHON = """#!/bin/sh
echo "ran: $*"
case "$*" in
*{broken}*) echo "what went wrong" >&2; exit 3 ;;
*{endless}*) exec sleep 60 ;;
esac
"""


def run(
    folder: Path, *phases: str, broken: str = "nothing", endless: str = "nothing", **environment: str
) -> subprocess.CompletedProcess[str]:
    python = folder / "python"
    python.write_text(PYTHON.format(broken=broken, endless=endless))
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "OUT": str(folder / "out"), "DEVICE": "cpu", **environment}
    command = ["sh", str(SCRIPT), *phases]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=50, check=False)


def test_every_phase_runs_by_default(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("failed: nothing\n"), done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["check.log", "ours.log", "rest.log"]
    for module in ("first_launch", "pytest", "kernels", "--arms ours,eager", "--arms ours,compiled,released"):
        assert module in done.stdout


@pytest.mark.parametrize(("broken", "failed"), [("test_golden", "tests"), ("first_launch", "first-launch")])
def test_a_step_that_fails_does_not_stop_the_others(broken: str, failed: str, tmp_path: Path) -> None:
    done = run(tmp_path, "check", "ours", broken=broken)
    assert done.returncode == 1
    assert done.stdout.endswith(f"failed: {failed}\n")
    assert "what went wrong" in (tmp_path / "out" / "check.log").read_text()
    assert "--arms ours,eager" in (tmp_path / "out" / "ours.log").read_text()


def test_a_phase_ends_in_its_time_and_what_did_not_run_is_listed(tmp_path: Path) -> None:
    done = run(tmp_path, "check", "ours", endless="first_launch", PHASE_S="2")
    assert done.returncode == 1
    failed = done.stdout.splitlines()[-1]
    assert "first-launch(over-" in failed and "tests(not-run)" in failed
    assert "ours(" not in failed  # the next phase has time of its own


def test_with_a_card_the_server_and_the_training_are_measured_too(tmp_path: Path) -> None:
    for name in ("nvidia-smi", "compute-sanitizer"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "ran {name} $*"\n')
        (tmp_path / name).chmod(0o755)
    done = run(tmp_path, DEVICE="cuda", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.stdout.endswith("failed: nothing\n"), done.stdout + done.stderr
    for command in (
        "nvidia-smi",
        "compute-sanitizer",
        "benchmarks.serving --model 7b",
        "entropy_loss",
        "tests/em_train",
    ):
        assert command in done.stdout
    assert "PYTEST_ADDOPTS=-n 8" in done.stdout
    assert "--quick" not in done.stdout


def test_an_unknown_phase_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "checks")
    assert done.returncode == 2 and "no phase 'checks'" in done.stderr
