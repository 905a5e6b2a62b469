"""The standard load test: the demo model, served as the other benchmarks serve it, and em-loadtest against it.

`.venv/bin/python -m benchmarks.loadtest [SCENARIO] [flags of em-loadtest run]`.
"""

import sys
from pathlib import Path

from benchmarks.launch import EM_SERVE, serve
from loadtest.cli import main

FLAGS = ("--max-num-seqs", "256")


def run(scenario: str, flags: list[str]) -> int:
    """Serve, run, stop; em-loadtest's exit status."""
    log = Path("build/loadtest/server.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with serve(*EM_SERVE, *FLAGS, log=log) as server:
        how = f"em-serve {' '.join(FLAGS)}, the model in the engine's process"
        return main(["run", scenario, "--base-url", server.url, "--server-flags", how, *flags])


if __name__ == "__main__":
    standard = "loadtest/scenarios/demo.yaml"
    named = sys.argv[1:] and not sys.argv[1].startswith("-")
    sys.exit(run(sys.argv[1] if named else standard, sys.argv[2 if named else 1 :]))
