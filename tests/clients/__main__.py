"""`make clients`: common client libraries against a server with the demo model; writes build/clients/clients.md.

Each library sends the calls of CALLS. A call is right if its reply is; what arrives of usage and of our block is told.
Ends with 1 if a reply is wrong. scripts/clients.sh installs the libraries, each call has a process of its own.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.launch import EM_SERVE, serve

HERE = Path(__file__).parent
FOLDER = Path("build/clients")
PYTHON, NODE = "build/clients/venv/bin/python", "build/clients/node_modules"
LIMIT_S = 600
ANSWER = "29"  # of demo's question in both files of calls
PYTHON_LIBRARIES = {
    "openai": "openai",
    "openai, stream helper": "openai",
    "litellm": "litellm",
    "langchain": "langchain-openai",
    "pydantic-ai": "pydantic-ai-slim",
    "llama-index": "llama-index-llms-openai-like",
    "haystack": "haystack-ai",
    "guidellm": "guidellm",
    "lm-eval": "lm-eval",
    "curl": "",
}
NODE_LIBRARIES = {"openai for node": "openai", "ai-sdk": "@ai-sdk/openai-compatible"}
EM_INF, VOTE = {"em_inf": {"stats": "summary"}}, {"strategy": {"type": "self_consistency", "n": 3}}
CALLS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "streamed": ({}, True),
    "`em_inf`": (EM_INF, False),
    "`em_inf`, streamed": (EM_INF, True),
    "`strategy`": (VOTE, False),
    "`strategy`, streamed": (VOTE, True),
}


@dataclass(frozen=True)
class Cell:
    """What one call met."""

    said: str
    right: bool


def call(library: str, url: str) -> list[Cell]:
    """Let a library make its calls, in a process of its own."""
    program = ["node", "build/clients/calls.mjs"] if library in NODE_LIBRARIES else [PYTHON, str(HERE / "calls.py")]
    variables = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "HAYSTACK_TELEMETRY_ENABLED": "False"}
    command = [*program, library, url, json.dumps([*CALLS.values()])]
    try:
        done = subprocess.run(
            command, env=os.environ | variables, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [Cell(f"failed: no end within {LIMIT_S} s", False)] * len(CALLS)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    said += [{"failed": done.stderr[-300:]}] * (len(CALLS) - len(said))
    return [cell(result, bool(extra)) for result, (extra, _) in zip(said, CALLS.values(), strict=True)]


def cell(result: dict[str, Any], has_extra: bool) -> Cell:
    """Judge what one call printed."""
    if "cannot" in result:
        return Cell(result["cannot"], True)
    if "failed" in result:
        return Cell(f"failed: {' '.join(result['failed'].split())[-200:]}", False)
    if ANSWER not in (result["text"] or ""):
        return Cell(f"wrong: {result['text']!r:.100}", False)
    parts = ["right", "usage" if result["usage"] else "no usage"]
    if has_extra:
        parts.append("block" if result["block"] else "no block")
    return Cell(", ".join(parts), True)


def versions() -> dict[str, str]:
    """Return the version of each library."""
    names = json.dumps(sorted({name for name in PYTHON_LIBRARIES.values() if name}))
    ask = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    done = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=True)
    installed: dict[str, str] = json.loads(done.stdout)
    found = {library: installed.get(package, "") for library, package in PYTHON_LIBRARIES.items()}
    curl = subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True)
    found["curl"] = curl.stdout.split()[1]
    for library, package in NODE_LIBRARIES.items():
        found[library] = json.loads(Path(NODE, package, "package.json").read_text())["version"]
    return found


def table(results: dict[str, list[Cell]]) -> str:
    """Return the table as markdown."""
    number = versions()
    lines = ["| library | " + " | ".join(CALLS) + " |", "|---" * (len(CALLS) + 1) + "|"]
    for library, cells in results.items():
        lines.append(f"| {library} {number[library]} | " + " | ".join(cell.said for cell in cells) + " |")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def server(url: str | None) -> Iterator[str]:
    """Yield the address of a server: the one given, or one that is started."""
    if url:
        yield url
        return
    with serve(*EM_SERVE, log=FOLDER / "server.log") as started:
        yield started.url


def main() -> None:
    """Run every library's calls."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("libraries", nargs="*", help="default: all")
    parser.add_argument("--url", help="a server with the demo model, without /v1; default: start one")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # by an exception: the server is stopped too
    libraries = arguments.libraries or [*PYTHON_LIBRARIES, *NODE_LIBRARIES]
    FOLDER.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Cell]] = {}
    with server(arguments.url) as url:
        for library in libraries:
            results[library] = call(library, url)
            print(library, *(cell.said for cell in results[library]), sep=" | ", flush=True)
    (FOLDER / "clients.md").write_text(table(results))
    print(table(results))
    sys.exit(any(not cell.right for cells in results.values() for cell in cells))


if __name__ == "__main__":
    main()
