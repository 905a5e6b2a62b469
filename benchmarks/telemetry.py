"""What statistics cost: output tokens per second with none, a summary, and every token's entropy, in one server.

`.venv/bin/python -m benchmarks.telemetry`; figures: docs/findings/statistics-cost.md. The arms take turns within
each round, so that what else the machine does meets all of them; a ratio is of two arms of one round.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx

ARMS: dict[str, Any] = {
    "no em_inf": False,
    "none": {"stats": "none"},
    "summary": {"stats": "summary"},
    "tokens": {"stats": "tokens"},
}
BASELINE = "none"
PROMPT = "Q"  # nothing the demo model was trained on: its next characters are open, and EM-INF has work to do


async def tokens_per_second(client: httpx.AsyncClient, em_inf: Any, args: argparse.Namespace) -> float:
    """One arm's turn: `requests` requests of `tokens` tokens, `concurrency` at a time."""
    turn = asyncio.Semaphore(args.concurrency)
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": args.tokens, "ignore_eos": True, "em_inf": em_inf}

    async def one() -> int:
        async with turn:
            answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
        entries = answer.get("em_inf", [])
        if bool(entries) != (isinstance(em_inf, dict) and em_inf["stats"] != "none") or any(
            entry["missing"] for entry in entries
        ):
            raise RuntimeError(f"statistics are wrong: {entries}")
        return int(answer["usage"]["completion_tokens"])

    start = time.perf_counter()
    generated = sum(await asyncio.gather(*(one() for _ in range(args.requests))))
    return generated / (time.perf_counter() - start)


async def measure(url: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Output tokens per second, by arm and round."""
    rates: dict[str, list[float]] = {name: [] for name in ARMS}
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        for number in range(-1, args.rounds):  # the first round warms up
            names = list(ARMS)
            for name in names if number % 2 else reversed(names):
                rate = await tokens_per_second(client, ARMS[name], args)
                if number >= 0:
                    rates[name].append(rate)
    return rates


def spread(values: Sequence[float], digits: int) -> str:
    """median (lowest to highest)."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def report(rates: dict[str, list[float]]) -> None:
    """A row for each arm."""
    print(f"| stats | output tokens/s | of `{BASELINE}`, same round |\n|---|---|---|")
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, rates[BASELINE], strict=True)]
        print(f"| {name} | {spread(values, 0)} | {spread(ratios, 3)} |")


def main() -> None:
    """Start em-serve on the demo model, or use the server given, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a server that runs already (default: start em-serve on the demo model)")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()
    if args.url:
        return report(asyncio.run(measure(args.url, args)))
    url = f"http://127.0.0.1:{args.port}"
    command = [sys.executable, "-m", "server.cli", "--host", "127.0.0.1", "--port", str(args.port)]
    server = subprocess.Popen(
        [*command, "--max-num-seqs", str(args.concurrency), "--disable-uvicorn-access-log"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while server.poll() is None:
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(1)
        return report(asyncio.run(measure(url, args)))
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
