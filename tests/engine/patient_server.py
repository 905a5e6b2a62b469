"""em-serve as its tests start it: responses and metrics wait for late stats as long as a slow machine needs.

vLLM starts its processes by `spawn`, which runs the top level of this module in each of them before anything else.
"""

import sys

from server import cli
from server.stats import collector

assert "server.engine" not in sys.modules, "it has imported the limits already"
collector.RESPONSE_TIMEOUT_S = 30.0
collector.METRICS_TIMEOUT_S = 30.0

if __name__ == "__main__":
    cli.main()
