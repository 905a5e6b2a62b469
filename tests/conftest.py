"""Triton's kernels run under its interpreter in the tests, unless these are for a GPU (benchmarks/gpu.sh)."""

import os

if os.environ.get("EM_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
