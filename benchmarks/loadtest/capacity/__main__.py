"""How much load em-loadtest can generate on one core: requests in flight and chunks/s, measured on the mock server.

`.venv/bin/python -m benchmarks.loadtest.capacity`. The mock server has another core and sends every chunk when due.
"""

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import psutil

from harness.ports import free_port
from loadtest import mock
from loadtest.client import Client
from loadtest.intervals import percentiles
from loadtest.load import run_load
from loadtest.measurements import MeasuredQuestion, MeasuredRequest
from loadtest.scenario import Closed, Limits

BODY: dict[str, Any] = {"model": mock.MODEL, "messages": [{"role": "user", "content": "1+2"}]}
BODY |= {"stream": True, "stream_options": {"include_usage": True}}


def main() -> None:
    """Print a line for each number of requests in flight."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[250, 500, 1000, 2000])
    parser.add_argument("--chunks-per-second", type=float, default=5000)
    parser.add_argument("--tokens", type=int, default=30, help="tokens of a reply")
    parser.add_argument("--rounds", type=int, default=4, help="replies for each request in flight")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    our_core, mock_core = cores[0], cores[1 % len(cores)]
    for in_flight in options.in_flight:
        gap_s = in_flight / options.chunks_per_second
        script = mock.Script(tokens=options.tokens, per_token=gap_s, first_token=gap_s)
        with mock_server(script) as (url, process_id):
            os.sched_setaffinity(process_id, {mock_core})
            os.sched_setaffinity(0, {our_core})
            print(asyncio.run(measure(url, process_id, in_flight, gap_s, options)), flush=True)


@contextlib.contextmanager
def mock_server(script: mock.Script) -> Iterator[tuple[str, int]]:
    """Start em-loadtest's mock server, and yield its URL and its process id."""
    port = free_port()
    flags = ("--port", str(port), "--script", script.model_dump_json())
    process = subprocess.Popen([sys.executable, "-m", "loadtest.cli", "mock", *flags])
    try:
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait()


async def _answers(client: Client) -> bool:
    try:
        await client.get(f"{client.root}/models")
    except ValueError:
        return False
    return True


async def measure(url: str, process_id: int, in_flight: int, gap_s: float, options: argparse.Namespace) -> str:
    """Generate the load, and return what came of it as one line. `gap_s`: the mock's time between two chunks."""
    reply_s = gap_s * (1 + options.tokens)
    busy = time.process_time()
    async with Client(url, None, Limits()) as client:
        while not await _answers(client):
            await asyncio.sleep(0.1)
        requests: list[MeasuredRequest] = []

        async def ask(index: int, due: float) -> MeasuredQuestion:
            if index < in_flight:
                await asyncio.sleep(reply_s * index / in_flight)  # clients of a real server are not in step
            requests.append(await client.send(BODY | {"seed": index}, began))
            return MeasuredQuestion(index, due, [requests[-1]])

        began = time.monotonic()
        load = Closed(type="closed", concurrency=in_flight)
        delays = await run_load(load, range(in_flight * options.rounds), ask, began, 0)
        seconds = time.monotonic() - began
        used = time.process_time() - busy, sum(psutil.Process(process_id).cpu_times()[:2])
    # The middle half of the time: connections are made before it, and the load runs out after it.
    low, high = seconds / 4, seconds * 3 / 4
    gaps = chunk_gaps(requests, low, high)
    delay = percentiles(delays[len(delays) // 4 : len(delays) * 3 // 4])
    ratio = percentiles(gap / gap_s for gap in gaps if gap)
    assert delay and ratio
    return (
        f"{in_flight} in flight: {sum(each.status == 'ok' for each in requests)} of {len(requests)} complete; "
        f"{len(gaps) / (high - low):.0f} chunks/s; cores busy: generator {used[0] / seconds:.2f}, mock "
        f"{used[1] / seconds:.2f}; scheduling delay p50 {delay.p50 * 1000:.1f} ms, p99 {delay.p99 * 1000:.1f} ms; "
        f"between chunks, in the mock's gaps: p50 {ratio.p50:.3f}, p99 {ratio.p99:.3f}"
    )


def chunk_gaps(requests: Sequence[MeasuredRequest], low: float, high: float) -> list[float]:
    """Return the seconds since the previous chunk (0 for a first one) of each chunk that arrived from low to high."""
    return [
        gap
        for request in requests
        for arrival, gap in zip(accumulate([request.first or 0.0, *request.gaps]), [0.0, *request.gaps], strict=True)
        if low <= arrival < high
    ]


if __name__ == "__main__":
    main()
