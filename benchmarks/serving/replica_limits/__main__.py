"""What a replica asks of those around it, for docs/scaling.md: processor time of its API server, metrics, memory.

`.venv/bin/python -m benchmarks.replica`, on the demo model. The processor time is that of one process, so that what
else runs on the machine disturbs it little; arms take turns, and a figure is the median of the rounds.
"""

import argparse
import asyncio
import statistics
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.launch import EM_SERVE, serve
from em_sampler.stats.wire import TOKEN_DTYPE, TOTALS_DTYPE

CONCURRENCY, REQUESTS, TOKENS = 16, 64, 48
ARMS: dict[str, dict[str, Any]] = {
    f"{how}, {what}": {"stream": how == "streamed"} | ({"em_inf": em_inf} if em_inf else {})
    for how in ("whole", "streamed")
    for what, em_inf in {
        "em_inf off": None,
        "em_inf on": {"threshold": 0.3},
        "every token's statistics": {"threshold": 0.3, "stats": "tokens"},
    }.items()
}


async def load(url: str, arm: dict[str, Any]) -> None:
    """One arm's turn."""
    turn = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def one(number: int) -> None:
            message = {"role": "user", "content": f"{10 + number}+7*3-4"}
            body = {"model": "demo", "messages": [message], "seed": number, "max_tokens": TOKENS, "ignore_eos": True}
            async with turn:
                (await client.post("/v1/chat/completions", json=body | arm)).raise_for_status()

        await asyncio.gather(*(one(number) for number in range(REQUESTS)))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/replica"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    flags = (*EM_SERVE, "--max-num-seqs", str(CONCURRENCY))
    with serve(*flags, log=args.out / "em-serve.log", executor="mp") as server:
        api_server = psutil.Process(server.pid)

        async def spent(work: Awaitable[Any]) -> float:
            before = api_server.cpu_times()
            await work
            after = api_server.cpu_times()
            return after.user + after.system - before.user - before.system

        async def measure() -> dict[str, list[float]]:
            seconds: dict[str, list[float]] = {name: [] for name in ARMS}
            for number in range(-1, args.rounds):
                for name, arm in ARMS.items():
                    taken = await spent(load(server.url, arm))
                    if number >= 0:
                        seconds[name].append(taken)
            return seconds

        async def probe(path: str, times: int) -> float:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

                async def often() -> None:
                    for _ in range(times):
                        (await client.get(path)).raise_for_status()

                return await spent(often()) / times

        print("| API server's processor time | ms a reply of 48 tokens | us a token | of them least to most |")
        print("|---|---|---|---|")
        for name, taken in asyncio.run(measure()).items():
            each = sorted(value / REQUESTS / TOKENS * 1e6 for value in taken)
            middle = statistics.median(each)
            print(f"| {name} | {middle * TOKENS / 1000:.1f} | {middle:.0f} | {each[0]:.0f} to {each[-1]:.0f} |")
        page = httpx.get(f"{server.url}/metrics", timeout=60).text
        series = [line for line in page.splitlines() if line and not line.startswith("#")]
        ours = sum(line.startswith("em_inf_") for line in series)
        print(f"\n/metrics: {len(series)} series, {ours} of them em_inf_*, {len(page) / 1000:.0f} kB,", end=" ")
        print(f"{asyncio.run(probe('/metrics', 50)) * 1000:.1f} ms of processor time a scrape")
        print(f"/health/ready: {asyncio.run(probe('/health/ready', 500)) * 1000:.1f} ms of processor time")
        processes = [api_server, *api_server.children(recursive=True)]
        print("memory, MiB:", *(process.memory_info().rss >> 20 for process in processes))
    print(f"statistics: {TOKEN_DTYPE.itemsize} bytes a token, or {TOTALS_DTYPE.itemsize} a reply four times a second")


if __name__ == "__main__":
    main()
