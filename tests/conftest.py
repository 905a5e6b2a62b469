"""What must be set before the tests import anything: threads, and Triton's interpreter."""

import os

# Several tests and servers share the cores: threads of one test would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Unless the tests are for a GPU (benchmarks/gpu.sh), Triton's kernels run under its interpreter.
if os.environ.get("EM_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
