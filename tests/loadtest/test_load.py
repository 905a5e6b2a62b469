"""Loads: when each question is asked, and how late."""

import asyncio
import itertools
import time

import pytest

from loadtest.load import arrivals, run_load
from loadtest.measurements import MeasuredQuestion
from loadtest.scenario import Closed, Open


def test_a_closed_loop_asks_each_question_once_at_its_concurrency() -> None:
    asked: list[int] = []
    running, max_running = 0, 0

    async def ask(index: int, due: float) -> MeasuredQuestion:
        nonlocal running, max_running
        asked.append(index)
        running += 1
        max_running = max(max_running, running)
        await asyncio.sleep(0.001 * (index % 3))
        running -= 1
        return MeasuredQuestion(index, due)

    asyncio.run(run_load(Closed(type="closed", concurrency=4), range(30), ask, time.monotonic(), 0))
    assert sorted(asked) == list(range(30))
    assert max_running == 4


def test_arrivals_are_reproducible_and_have_the_rate() -> None:
    constant = arrivals(Open(type="constant", rate=4), 5, seed=1)
    assert constant == [0, 0.25, 0.5, 0.75, 1.0]
    poisson = arrivals(Open(type="poisson", rate=50), 5001, seed=1)
    assert (
        poisson
        == arrivals(Open(type="poisson", rate=50), 5001, seed=1)
        != arrivals(Open(type="poisson", rate=50), 5001, seed=2)
    )
    gaps = [after - before for before, after in itertools.pairwise(poisson)]
    assert sum(gaps) / 5000 == pytest.approx(1 / 50, rel=0.05)
    assert sum(gap < 0.01 for gap in gaps) / 5000 == pytest.approx(1 - 2.718281828**-0.5, abs=0.03)


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """No question is answered before the last is asked: one after another, the first would never be answered."""
    dues: list[float] = []
    answered: list[int] = []
    all_asked = asyncio.Event()

    async def ask(index: int, due: float) -> MeasuredQuestion:
        dues.append(due)
        if len(dues) == 20:
            all_asked.set()
        await asyncio.wait_for(all_asked.wait(), 60)
        answered.append(index)
        return MeasuredQuestion(index, due)

    delays = asyncio.run(run_load(Open(type="constant", rate=100), range(20), ask, time.monotonic(), 0))
    assert dues == pytest.approx([index / 100 for index in range(20)])
    assert len(delays) == 20 and min(delays) >= 0
    assert sorted(answered) == list(range(20))


@pytest.mark.parametrize("load", [Closed(type="closed", concurrency=2), Open(type="constant", rate=20)])
def test_a_late_generator_reports_its_delay(load: Closed | Open) -> None:
    async def ask(index: int, due: float) -> MeasuredQuestion:
        await asyncio.sleep(0)
        time.sleep(0.2)  # blocks the event loop
        return MeasuredQuestion(index, due)

    delays = asyncio.run(run_load(load, range(5), ask, time.monotonic(), 0))
    assert max(delays) > 0.1
