"""Triton's own launch path, with a stub in the place of its driver: Triton's interpreter passes it by."""

import json
import subprocess
import sys

import pytest

from em_sampler.transforms import triton_cuda
from harness import stub_driver
from tests.ptx import launches

INSTALLED = stub_driver.installed_release()


@pytest.mark.parametrize(
    "release",
    [INSTALLED, *(pytest.param(each, marks=pytest.mark.slow) for each in stub_driver.RELEASES if each != INSTALLED)],
)
def test_every_batch_is_launched_and_none_compiles(release: str) -> None:
    """A compilation takes seconds in the middle of serving, and vLLM's monitor may end the engine over it."""
    if not stub_driver.is_here(release):
        pytest.skip(f"Triton {release} is not here: scripts/test-triton.sh fetches it")
    done = subprocess.run(
        [sys.executable, "-m", "tests.ptx.launches"],
        env=stub_driver.environment(release), cwd=stub_driver.ROOT,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["triton"] == release
    six = [kernel.__name__ for kernel, _, _ in triton_cuda.LAUNCHES]
    assert found["launched"] == [six] * 6 * len(launches.CAPABILITIES)
    assert found["compiled"] == []
