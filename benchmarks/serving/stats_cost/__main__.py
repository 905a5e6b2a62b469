"""What statistics cost: output tokens per second with none, a summary, and every token's entropy, in one server.

`.venv/bin/python -m benchmarks.telemetry`; figures: docs/findings/statistics-cost.md. The arms take turns within
each round, so that what else the machine does meets all of them; a ratio is of two arms of one round.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.launch import EM_SERVE, serve
from benchmarks.load import client, turn
from benchmarks.ratios import paired, spread

ARMS: dict[str, Any] = {
    "no em_inf": False,
    "none": {"stats": "none"},
    "summary": {"stats": "summary"},
    "tokens": {"stats": "tokens"},
}
BASELINE = "none"
PROMPT = "Q"  # nothing the demo model was trained on: its next characters are open, and EM-INF has work to do


async def measure(url: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Output tokens per second, by arm and round."""
    rates: dict[str, list[float]] = {name: [] for name in ARMS}
    common = {"model": "demo", "prompt": PROMPT, "max_tokens": args.tokens, "ignore_eos": True}
    async with client(url) as http:
        for number in range(-1, args.rounds):  # the first round warms up
            names = list(ARMS)
            for name in names if number % 2 else reversed(names):
                bodies = [common | {"em_inf": ARMS[name]}] * args.requests
                rate, answers = await turn(http, bodies, args.concurrency)
                _check(answers, ARMS[name])
                if number >= 0:
                    rates[name].append(rate)
    return rates


def _check(answers: list[dict[str, Any]], em_inf: Any) -> None:
    wanted = isinstance(em_inf, dict) and em_inf["stats"] != "none"
    for answer in answers:
        entries = answer.get("em_inf", [])
        if bool(entries) != wanted or any(entry["missing"] for entry in entries):
            raise RuntimeError(f"statistics are wrong: {entries}")


def report(rates: dict[str, list[float]]) -> None:
    """A row for each arm."""
    print(f"| stats | output tokens/s | of `{BASELINE}`, same round |\n|---|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {spread(values, 0)} | {spread(paired(values, rates[BASELINE]), 3)} |")


def main() -> None:
    """Start em-serve on the demo model, or use the server given, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a server that runs already (default: start em-serve on the demo model)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()
    if args.url:
        return report(asyncio.run(measure(args.url, args)))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "em-serve.log")
        with serve(*EM_SERVE, "--max-num-seqs", str(args.concurrency), log=log) as server:
            return report(asyncio.run(measure(server.url, args)))


if __name__ == "__main__":
    main()
