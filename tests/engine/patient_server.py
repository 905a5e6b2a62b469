"""em-serve as its tests start it: responses and metrics wait for late stats as long as a slow machine needs.

Seeds are allowed beside chunked prefill on the CPU: the tests' requests with seeds are never chunked (conftest.py).

vLLM starts its processes by `spawn`, which runs the top level of this module in each of them before anything else.
"""

import sys

from server import cli, guards
from server.stats import collector

assert "server.engine" not in sys.modules, "it has imported the limits already"
collector.RESPONSE_TIMEOUT_S = 30.0
collector.METRICS_TIMEOUT_S = 30.0
guards.seeds_end_engine = lambda vllm_config: False

if __name__ == "__main__":
    cli.main()
