"""The standard load test: serves the demo model as the other benchmarks do, and runs em-loadtest on it.

`.venv/bin/python -m benchmarks.loadtest [SCENARIO] [flags of em-loadtest run]`.
"""

import sys
from pathlib import Path

from harness.launch import EM_SERVE, serve
from loadtest.cli import main as em_loadtest

SERVER_FLAGS = ("--max-num-seqs", "256")
STANDARD_SCENARIO = "loadtest/scenarios/demo.yaml"


def run(scenario: str, flags: list[str]) -> int:
    """Serve the demo model, run the scenario, stop the server; return em-loadtest's exit status."""
    log = Path("build/loadtest/server.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with serve(*EM_SERVE, *SERVER_FLAGS, log=log) as server:
        description = f"em-serve {' '.join(SERVER_FLAGS)}, the model in the engine's process"
        return em_loadtest(["run", scenario, "--base-url", server.url, "--server-flags", description, *flags])


def main() -> int:
    """Run the scenario that is named, or the standard one."""
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        return run(arguments[0], arguments[1:])
    return run(STANDARD_SCENARIO, arguments)


if __name__ == "__main__":
    sys.exit(main())
