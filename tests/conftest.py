"""What must be set before the tests import anything: threads, Triton's interpreter, and that no test is too slow."""

import os

from hypothesis import HealthCheck, settings

# Several tests and servers share the cores: threads of one test would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Unless the tests are for a GPU (benchmarks/gpu.sh), Triton's kernels run under its interpreter.
if os.environ.get("EM_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

# Hypothesis would fail a test for 200 ms, which a busy machine takes for anything.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")
