"""Loads: when each question is asked. Knows nothing of what asking means."""

import asyncio
import gc
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import accumulate

from loadtest.records import Item
from loadtest.scenario import Closed, Open

TICK = 0.01  # seconds
COLLECT_AFTER = 20_000  # objects more; Python's own setting is 700, and every 100th time all of them
Ask = Callable[[int, float], Awaitable[Item]]  # a question's index, and when it was due in seconds since the beginning


async def run_load(load: Closed | Open, order: Sequence[int], ask: Ask, began: float, seed: int) -> list[float]:
    """Ask all of `order` under the load, and wait for the answers.

    Returns:
        How late the generator was, in seconds: in an open loop each question; in a closed one, where a question is due
        when another is answered, a clock beside it that ticks every 10 ms.
    """
    lags: list[float] = []
    with _few_collections():
        if isinstance(load, Closed):
            async with _clock(lags):
                await _closed(load.concurrency, order, ask, began)
        else:
            await _open(load, order, ask, began, seed, lags)
    return lags


@contextmanager
def _few_collections() -> Iterator[None]:
    """Python's collector looks through all objects there are, which takes 0.2 s where thousands of calls are kept."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 10, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


async def _closed(concurrency: int, order: Sequence[int], ask: Ask, began: float) -> None:
    waiting = iter(order)

    async def worker(waiting: Iterator[int]) -> None:
        for index in waiting:
            await ask(index, time.monotonic() - began)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(order))):
            group.create_task(worker(waiting))


async def _open(load: Open, order: Sequence[int], ask: Ask, began: float, seed: int, lags: list[float]) -> None:
    async with asyncio.TaskGroup() as group:
        for index, due in zip(order, arrivals(load, len(order), seed), strict=True):
            await asyncio.sleep(began + due - time.monotonic())
            lags.append(time.monotonic() - began - due)
            group.create_task(_awaited(ask(index, due)))


def arrivals(load: Open, count: int, seed: int) -> list[float]:
    """When questions arrive: seconds since the beginning, the first at 0."""
    rng = random.Random(seed)
    gaps = [1 / load.rate if load.type == "constant" else rng.expovariate(load.rate) for _ in range(count - 1)]
    return [0.0, *accumulate(gaps)][:count]


async def _awaited(item: Awaitable[Item]) -> None:
    await item


@asynccontextmanager
async def _clock(lags: list[float]) -> AsyncIterator[None]:
    async def tick() -> None:
        while True:
            due = time.monotonic() + TICK
            await asyncio.sleep(TICK)
            lags.append(time.monotonic() - due)

    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
        with suppress(asyncio.CancelledError):
            await ticking
