"""A pytest plugin: Triton's kernels run on the emulator.

EM_PTX_NOISE is the part of the PTX manual's error bounds that is used (1), EM_PTX_SEED chooses errors and orders (0).
"""

import os

import pytest

from harness.stub_driver import StubDriver
from tests.ptx.approximations import Approximations
from tests.ptx.emulator import Emulator

EMULATOR = Emulator(Approximations(float(os.environ.get("EM_PTX_NOISE", "1")), int(os.environ.get("EM_PTX_SEED", "0"))))
StubDriver(execute=EMULATOR).install()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"PTX emulator: {EMULATOR.launches} launches")
