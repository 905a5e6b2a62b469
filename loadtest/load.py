"""Generates load: decides when each question is asked. Knows nothing of what asking means."""

import asyncio
import gc
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import accumulate

from loadtest.measurements import MeasuredQuestion
from loadtest.scenario import Closed, Open

CLOCK_INTERVAL_S = 0.01
GC_THRESHOLD = 20_000  # new objects; Python's default is 700, and a full collection every 100th time
Ask = Callable[[int, float], Awaitable[MeasuredQuestion]]  # a question's index, and when it is due, in s since `began`


async def run_load(load: Closed | Open, order: Sequence[int], ask: Ask, began: float, seed: int) -> list[float]:
    """Ask all questions of `order` under the load, and wait for the answers.

    Returns:
        Scheduling delays, by which the generator acted late, in seconds. In an open loop: of each question. In a closed
        loop a question is due only when another is answered, so a clock is measured that ticks every 10 ms.
    """
    delays: list[float] = []
    with _rare_garbage_collection():
        if isinstance(load, Closed):
            async with _clock(delays):
                await _closed(load.concurrency, order, ask, began)
        else:
            await _open(load, order, ask, began, seed, delays)
    return delays


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Keep full collections out of the load: with thousands of requests in memory, one takes 0.2 s."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 10, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


async def _closed(concurrency: int, order: Sequence[int], ask: Ask, began: float) -> None:
    remaining = iter(order)  # shared by the workers

    async def worker() -> None:
        for index in remaining:
            await ask(index, time.monotonic() - began)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(order))):
            group.create_task(worker())


async def _open(load: Open, order: Sequence[int], ask: Ask, began: float, seed: int, delays: list[float]) -> None:
    async with asyncio.TaskGroup() as group:
        for index, due in zip(order, arrivals(load, len(order), seed), strict=True):
            await asyncio.sleep(began + due - time.monotonic())
            delays.append(time.monotonic() - began - due)
            group.create_task(_awaited(ask(index, due)))


def arrivals(load: Open, count: int, seed: int) -> list[float]:
    """Return when questions are due, in seconds since the beginning; the first at 0."""
    rng = random.Random(seed)
    gaps = [1 / load.rate if load.type == "constant" else rng.expovariate(load.rate) for _ in range(count - 1)]
    return [0.0, *accumulate(gaps)][:count]


async def _awaited(question: Awaitable[MeasuredQuestion]) -> None:
    """Make a coroutine of any awaitable: a task needs one."""
    await question


@asynccontextmanager
async def _clock(delays: list[float]) -> AsyncIterator[None]:
    async def tick() -> None:
        while True:
            due = time.monotonic() + CLOCK_INTERVAL_S
            await asyncio.sleep(CLOCK_INTERVAL_S)
            delays.append(time.monotonic() - due)

    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
        with suppress(asyncio.CancelledError):
            await ticking
