"""What can be said of the Triton kernels without a card: host time, and predicted times from their machine code."""

import os
import re
import subprocess
import sys

import pytest

from benchmarks.transform.budget import busiest_pipe
from em_sampler.transforms.triton_cuda import LAUNCHES

VOCAB = "9001"


def run(module: str, *arguments: str) -> str:
    """Return what a benchmark prints. In a process of its own: Triton's interpreter compiles nothing."""
    command = [sys.executable, "-m", f"benchmarks.transform.{module}", "--vocab", VOCAB, *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_instructions_wait_for_the_pipe_that_most_of_them_need() -> None:
    assert busiest_pipe(["FADD"] * 5 + ["MUFU.EX2"]) == 8
    assert busiest_pipe(["FADD"] * 20 + ["MUFU.EX2"]) == 21  # the scheduler itself
    assert busiest_pipe(["FADD"] * 3 + ["IADD3", "FSETP.GT.AND"] * 2) == 8
    assert busiest_pipe(["IMAD", "IADD3", "SHFL.BFLY"]) == 4


@pytest.mark.slow
def test_a_budget_has_every_launch_and_grows_with_the_work() -> None:
    tables = run("budget", "--rows", "1", "256", "--steps", "5", "64").split("\n\n")
    kernels, cases = ([line.strip("| ").split(" | ") for line in table.splitlines()[2:]] for table in tables)
    assert [name for name, *_ in kernels] == [kernel.__name__ for kernel, *_ in LAUNCHES]
    assert all(int(warps) >= 1 and 16 <= int(registers) <= 255 for _, warps, registers, *_ in kernels)
    sums = {case: int(total) for case, *_, total, _ in cases}
    assert sums["1, 0, 5"] <= sums["1, 1, 5"] < sums["1, 1, 64"] < sums["256, 256, 64"]
    assert sums["256, 0, 5"] < sums["256, 256, 5"] < sums["256, 256, 64"]


@pytest.mark.slow
def test_host_time_is_printed_for_each_number_of_rows() -> None:
    rows = re.findall(r"^(\d+) x 9001: [\d.]+ us \(quartiles", run("host_time", "--rows", "1", "7"), re.MULTILINE)
    assert rows == ["1", "7"]
