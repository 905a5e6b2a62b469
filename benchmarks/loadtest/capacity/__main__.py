"""What em-loadtest's generator can hold, on one core: requests in flight and chunks per second, from the mock server.

`.venv/bin/python -m benchmarks.generator`. The mock has a core of its own; it sends every chunk when it is due.
"""

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import time
from itertools import accumulate
from typing import Any

import psutil
from loadtest.records import Item
from loadtest.statistics import percentiles

from loadtest import mock
from loadtest.client import Client
from loadtest.load import run_load
from loadtest.scenario import Closed, Limits

BODY: dict[str, Any] = {"model": mock.MODEL, "messages": [{"role": "user", "content": "1+2"}]}
BODY |= {"stream": True, "stream_options": {"include_usage": True}}


def main() -> None:
    """One line for each number of requests in flight."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[250, 500, 1000, 2000])
    parser.add_argument("--chunks-per-second", type=float, default=5000)
    parser.add_argument("--tokens", type=int, default=30, help="of a reply")
    parser.add_argument("--rounds", type=int, default=4, help="replies for each place in flight")
    options = parser.parse_args()
    ours, theirs, *_ = [*sorted(os.sched_getaffinity(0)), *sorted(os.sched_getaffinity(0))]
    for in_flight in options.in_flight:
        gap = in_flight / options.chunks_per_second
        script = mock.Script(tokens=options.tokens, per_token=gap, first_token=gap)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "loadtest.cli",
            "mock",
            "--port",
            str(port),
            "--script",
            script.model_dump_json(),
        ]
        server = subprocess.Popen(command)
        try:
            os.sched_setaffinity(server.pid, {theirs})
            os.sched_setaffinity(0, {ours})
            print(asyncio.run(measure(f"http://127.0.0.1:{port}", server.pid, in_flight, options)), flush=True)
        finally:
            server.terminate()
            server.wait()


async def measure(url: str, server: int, in_flight: int, options: argparse.Namespace) -> str:
    """How it went, in words. `server`: the mock's process."""
    gap = in_flight / options.chunks_per_second
    length = gap * (1 + options.tokens)
    busy = time.process_time()
    async with Client(url, None, Limits()) as client:
        while await client.get("/v1/models") is None:
            await asyncio.sleep(0.1)
        items: list[Item] = []

        async def ask(index: int, due: float) -> Item:
            if index < in_flight:
                await asyncio.sleep(length * index / in_flight)  # clients of a real server are not in step
            items.append(Item(index, due, [await client.call(BODY | {"seed": index}, began)]))
            return items[-1]

        began = time.monotonic()
        lags = await run_load(
            Closed(type="closed", concurrency=in_flight), range(in_flight * options.rounds), ask, began, 0
        )
        seconds = time.monotonic() - began
        used = time.process_time() - busy, sum(psutil.Process(server).cpu_times()[:2])
    calls = [call for item in items for call in item.calls]
    # The middle half: before it connections are made, after it the load runs out.
    low, high = seconds / 4, seconds * 3 / 4
    chunks, gaps = 0, []
    for call in calls:
        for at, between in zip(accumulate([call.first or 0.0, *call.gaps]), [0.0, *call.gaps], strict=True):
            if low <= at < high:
                chunks += 1
                gaps.append(between / gap)
    lag, late = percentiles(lags[len(lags) // 4 : len(lags) * 3 // 4]), percentiles(filter(None, gaps))
    assert lag and late
    return (
        f"{in_flight} in flight: {sum(call.status == 'ok' for call in calls)} of {len(calls)} whole; "
        f"{chunks / (high - low):.0f} chunks/s; cores busy: generator {used[0] / seconds:.2f}, mock "
        f"{used[1] / seconds:.2f}; lag p50 {lag.p50 * 1000:.1f} ms, p99 {lag.p99 * 1000:.1f} ms; "
        f"between chunks, in the mock's gaps: p50 {late.p50:.3f}, p99 {late.p99:.3f}"
    )


if __name__ == "__main__":
    main()
