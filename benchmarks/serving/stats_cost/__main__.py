"""What stats cost: output tokens/s with none, with summaries, and with every token's entropy, on one server.

`.venv/bin/python -m benchmarks.serving.stats_cost`; figures: docs/findings/stats-cost.md. The configs alternate
within each round, so that other load on the machine affects all of them; a ratio is of two configs of one round.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.completions import measure_rate, open_client
from benchmarks.intervals import median_and_range, paired_ratios
from harness.launch import EM_SERVE, serve

CONFIGS: dict[str, Any] = {
    "no em_inf": False,
    "none": {"stats": "none"},
    "summary": {"stats": "summary"},
    "tokens": {"stats": "tokens"},
}
BASELINE = "none"
PROMPT = "Q"  # the demo model was never trained on it: its next tokens are uncertain, so that EM-INF has work to do


async def measure(url: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return output tokens per second of each round, by config."""
    rates: dict[str, list[float]] = {name: [] for name in CONFIGS}
    common = {"model": "demo", "prompt": PROMPT, "max_tokens": args.tokens, "ignore_eos": True}
    async with open_client(url) as client:
        for number in range(-1, args.rounds):  # the first round warms up
            names = list(CONFIGS)
            for name in names if number % 2 else reversed(names):
                bodies = [common | {"em_inf": CONFIGS[name]}] * args.requests
                rate, responses = await measure_rate(client, bodies, args.concurrency)
                _check(responses, CONFIGS[name])
                if number >= 0:
                    rates[name].append(rate)
    return rates


def _check(responses: list[dict[str, Any]], em_inf: Any) -> None:
    wanted = isinstance(em_inf, dict) and em_inf["stats"] != "none"
    for response in responses:
        summaries = response.get("em_inf", [])
        if bool(summaries) != wanted or any(summary["missing"] for summary in summaries):
            raise RuntimeError(f"the stats are wrong: {summaries}")


def report(rates: dict[str, list[float]]) -> None:
    """Print a table with a row for each config."""
    print(f"| stats | output tokens/s | of `{BASELINE}`, same round |\n|---|---|---|")
    for name, values in rates.items():
        ratios = paired_ratios(values, rates[BASELINE])
        print(f"| {name} | {median_and_range(values, 0)} | {median_and_range(ratios, 3)} |")


def main() -> None:
    """Start em-serve on the demo model, or use the given server, and measure."""
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
