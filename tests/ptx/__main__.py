"""Run any test of the transforms with the Triton kernels on the PTX emulator instead of a GPU.

    python -m tests.ptx --triton 3.6.0 -- tests/em_sampler/transforms/test_golden.py -k triton_cuda

The releases are the installed one and those that scripts/test-triton.sh has fetched.
"""

import argparse
import os
import sys

from harness import stub_driver

EMULATED = "3.6.0"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--triton", metavar="RELEASE", default=EMULATED, help="default: %(default)s")
    parser.add_argument("--noise", default="1", help="the part of PTX's error bounds that is used (1)")
    parser.add_argument("--seed", default="0", help="chooses the errors, and the order of CTAs (0)")
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="pytest's, after --")
    given = parser.parse_args()
    if not stub_driver.is_here(given.triton):
        sys.exit(f"Triton {given.triton} is not here: run scripts/test-triton.sh")
    variables = {
        "EM_TEST_DEVICE": "cpu:0",  # not "cpu", which stands for the interpreter
        "EM_PTX_NOISE": given.noise,
        "EM_PTX_SEED": given.seed,
    }
    command = [sys.executable, "-m", "pytest", "-p", "tests.ptx.plugin", *given.arguments]
    os.execve(sys.executable, command, stub_driver.environment(given.triton) | variables)


if __name__ == "__main__":
    main()
