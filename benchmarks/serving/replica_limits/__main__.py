"""What one replica needs, for docs/scaling.md: processor time of its API server, size of its metrics, memory.

`.venv/bin/python -m benchmarks.serving.replica_limits`, on the demo model. The processor time is that of one process,
so that other load on the machine has little effect. The configs alternate; a figure is the median of the rounds.
"""

import argparse
import asyncio
import statistics
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.completions import open_client, post_all
from em_sampler.stats.wire import TOKEN_DTYPE, TOTALS_DTYPE
from harness.launch import EM_SERVE, Server, serve

CONCURRENCY, REQUESTS, TOKENS = 16, 64, 48
CONFIGS: dict[str, dict[str, Any]] = {
    f"{how}, {what}": {"stream": how == "streamed"} | ({"em_inf": em_inf} if em_inf else {})
    for how in ("not streamed", "streamed")
    for what, em_inf in {
        "em_inf off": None,
        "em_inf on": {"threshold": 0.3},
        "every token's stats": {"threshold": 0.3, "stats": "tokens"},
    }.items()
}


async def send_load(client: httpx.AsyncClient, config: dict[str, Any]) -> None:
    """Send the chat requests of one config and read the responses."""
    common = {"model": "demo", "max_tokens": TOKENS, "ignore_eos": True} | config
    bodies = [
        common | {"seed": number, "messages": [{"role": "user", "content": f"{10 + number}+7*3-4"}]}
        for number in range(REQUESTS)
    ]
    await post_all(client, "/v1/chat/completions", bodies, CONCURRENCY, httpx.Response.read)


async def send_gets(client: httpx.AsyncClient, path: str, count: int) -> None:
    """GET `path` `count` times, one after the other."""
    for _ in range(count):
        (await client.get(path)).raise_for_status()


async def processor_time(process: psutil.Process, work: Awaitable[None]) -> float:
    """Return the seconds of processor time that `process` uses during `work`."""
    before = process.cpu_times()
    await work
    after = process.cpu_times()
    used: float = after.user + after.system - before.user - before.system
    return used


async def measure_configs(server: Server, rounds: int) -> dict[str, list[float]]:
    """Return processor seconds of the API server in each round, by config."""
    api_server = server.processes()[0]
    seconds: dict[str, list[float]] = {name: [] for name in CONFIGS}
    for number in range(-1, rounds):  # the first round warms up
        for name, config in CONFIGS.items():
            async with open_client(server.url) as client:
                used = await processor_time(api_server, send_load(client, config))
            if number >= 0:
                seconds[name].append(used)
    return seconds


async def measure_gets(server: Server, path: str, count: int) -> float:
    """Return the API server's processor time for one GET of `path`, in milliseconds."""
    async with open_client(server.url) as client:
        return await processor_time(server.processes()[0], send_gets(client, path, count)) / count * 1000


def print_report(server: Server, rounds: int) -> None:
    """Measure the server and print every figure."""
    print("| API server's processor time | ms a reply of 48 tokens | us a token | of them least to most |")
    print("|---|---|---|---|")
    for name, seconds in asyncio.run(measure_configs(server, rounds)).items():
        per_token_us = sorted(value / REQUESTS / TOKENS * 1e6 for value in seconds)
        median_us = statistics.median(per_token_us)
        extremes = f"{per_token_us[0]:.0f} to {per_token_us[-1]:.0f}"
        print(f"| {name} | {median_us * TOKENS / 1000:.1f} | {median_us:.0f} | {extremes} |")
    page = httpx.get(f"{server.url}/metrics", timeout=60).text
    series = [line for line in page.splitlines() if line and not line.startswith("#")]
    ours = sum(line.startswith("em_inf_") for line in series)
    print(f"\n/metrics: {len(series)} series, {ours} of them em_inf_*, {len(page) / 1000:.0f} kB,", end=" ")
    print(f"{asyncio.run(measure_gets(server, '/metrics', 50)):.1f} ms of processor time a scrape")
    print(f"/health/ready: {asyncio.run(measure_gets(server, '/health/ready', 500)):.1f} ms of processor time")
    print("memory, MiB:", *(process.memory_info().rss >> 20 for process in server.processes()))
    print(f"stats: {TOKEN_DTYPE.itemsize} bytes a token, or {TOTALS_DTYPE.itemsize} a reply four times a second")


def main() -> None:
    """Serve the demo model and print what it needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/replica"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    flags = ("--max-num-seqs", str(CONCURRENCY))
    with serve(*EM_SERVE, *flags, log=args.out / "em-serve.log", executor="mp") as server:
        print_report(server, args.rounds)


if __name__ == "__main__":
    main()
