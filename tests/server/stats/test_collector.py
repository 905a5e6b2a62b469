"""Records in, summaries out: what a reply waits for, what it leaves out, and that nothing stays behind."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from prometheus_client import CollectorRegistry

from em_sampler import AdaptiveTemperatureParams, EMInfParams
from em_sampler.params import RETURN_ADDRESS_KEY
from em_sampler.stats.aggregator import ReturnAddress
from em_sampler.stats.transport import connect, socket_dir
from em_sampler.stats.wire import TOKEN_DTYPE, TOTALS_DTYPE, VALUES_DTYPE, StructuredArray, add_tokens, pack
from server.stats.collector import ChoiceStats, RequestStats, StatsCollector, summarize
from server.stats.metrics import Metrics

NAN = math.nan
NOW = 0.02  # a grace that a test can wait for
NEVER = 1000.0
Values = tuple[float, float, int]


@pytest.fixture
def folder() -> Iterator[Path]:
    with socket_dir() as path:
        yield Path(path)


def run(folder: Path, test: Callable[[StatsCollector], Awaitable[None]]) -> CollectorRegistry:
    """Run `test` with statistics of its own; returns their metrics."""
    registry = CollectorRegistry()

    async def main() -> None:
        statistics = StatsCollector(Metrics("m", registry), f"ipc://{folder}")
        try:
            await test(statistics)
        finally:
            asyncio.get_running_loop().remove_reader(statistics.socket.getsockopt(zmq.FD))
            statistics.socket.close(linger=0)

    asyncio.run(main())
    return registry


def count(registry: CollectorRegistry, name: str, method: str = "em_inf") -> float | None:
    return registry.get_sample_value(f"em_inf_{name}", {"model": "m", "method": method})


def opened(statistics: StatsCollector, choices: int = 1) -> RequestStats:
    tally = statistics.tally(EMInfParams(), choices)
    statistics.open(tally)
    return tally


def at(position: int) -> Values:
    return 1.0 + position, 0.5, position


def records(*tokens: tuple[int, int, int, Values]) -> StructuredArray:
    """Each (request, choice, position, values)."""
    flat = [(request, choice, position, *values) for request, choice, position, values in tokens]
    return np.array(flat, dtype=TOKEN_DTYPE)


def totals(request: int, choice: int, first: int, upto: int) -> StructuredArray:
    """Of positions from `first` up to `upto`."""
    row = np.zeros(1, dtype=TOTALS_DTYPE)
    row["request"], row["choice"], row["first"], row["upto"] = request, choice, first, upto
    values = np.array([at(position) for position in range(first, upto)], dtype=VALUES_DTYPE)
    add_tokens(row, np.zeros(len(values), dtype=np.intp), values)
    return row


NO_TOKENS, NO_TOTALS = np.zeros(0, TOKEN_DTYPE), np.zeros(0, TOTALS_DTYPE)


def receive(statistics: StatsCollector, tokens: StructuredArray = NO_TOKENS, rows: StructuredArray = NO_TOTALS) -> None:
    statistics.receive(pack([tokens], [rows], 0.0, 0))


# One choice


def test_a_choice_keeps_the_last_record_of_a_position() -> None:
    choice = ChoiceStats()
    choice.tokens = 2
    choice.records = {1: (9.0, 9.0, 9), 0: at(0)}
    choice.records[1] = at(1)
    choice.settle()
    assert list(choice.records) == [0, 1]
    assert choice.totals[["tokens", "steps", "before_sum"]].tolist() == [(2, 1, 3.0)]


def test_totals_stand_for_the_records_they_cover() -> None:
    choice = ChoiceStats()
    choice.tokens = 6
    choice.records = dict.fromkeys(range(1, 6), (9.0, 9.0, 9))
    choice.add_totals(totals(0, 0, 0, 4)[0])
    assert sorted(choice.records) == [4, 5]
    assert choice.missing() == 0
    choice.settle()
    assert choice.totals[["tokens", "steps"]].tolist() == [(6, 0 + 1 + 2 + 3 + 9 + 9)]


def test_totals_of_nothing_cover_nothing() -> None:
    choice = ChoiceStats()
    choice.records = {0: at(0), 5: at(5)}
    empty = totals(0, 0, 0, 0)
    empty["first"] = np.iinfo(np.uint32).max  # as a worker sends it
    choice.add_totals(empty[0])
    assert sorted(choice.records) == [0, 5]


def test_records_past_the_end_of_the_reply_are_dropped() -> None:
    choice = ChoiceStats()
    choice.tokens = 2
    choice.records = {position: at(position) for position in (5, 2, 0)}
    assert choice.missing() == 1  # position 1; a record past the end does not stand for it
    choice.settle()
    assert choice.records == {0: at(0)}
    assert choice.totals[["tokens", "steps"]].tolist() == [(1, 0)]


# The table


def test_a_report_carries_the_return_address(folder: Path) -> None:
    async def test(statistics: StatsCollector) -> None:
        first, second = (statistics.tally(EMInfParams(), 2) for _ in range(2))
        assert first.number != second.number
        for tally, every_token in ((first, True), (second, False)):
            report = ReturnAddress.of(statistics.report(tally, every_token) | {"other": 1})
            assert report == ReturnAddress(statistics.channel, tally.number, 0, every_token)
        assert list(statistics.report(first, True)) == [RETURN_ADDRESS_KEY]
        assert (folder / statistics.channel).is_socket()

    run(folder, test)


def test_a_request_with_all_its_records_is_settled_at_once(folder: Path) -> None:
    async def test(statistics: StatsCollector) -> None:
        tally = opened(statistics, choices=2)
        tally.choices[0].tokens, tally.choices[1].tokens = 2, 1
        n = tally.number
        receive(statistics, records((n, 0, 1, at(1)), (n, 1, 0, at(5)), (n, 0, 0, at(0))))
        assert not tally.settled.is_set()  # the engine is not done with it
        statistics.finish(tally, NEVER)
        assert tally.settled.is_set()
        assert tally.choices[0].records == {0: at(0), 1: at(1)}
        assert tally.choices[1].records == {0: at(5)}
        assert not statistics.tallies

    registry = run(folder, test)
    assert count(registry, "tokens_total") == 3
    assert count(registry, "steps_total") == 6
    assert count(registry, "missing_tokens_total") == 0


def test_the_last_record_settles_a_request_that_waits(folder: Path) -> None:
    async def test(statistics: StatsCollector) -> None:
        tally = opened(statistics)
        tally.choices[0].tokens = 2
        receive(statistics, records((tally.number, 0, 1, at(1))))
        statistics.finish(tally, NEVER)
        assert not tally.settled.is_set()
        receive(statistics, records((tally.number, 0, 2, at(2))))  # past the end
        assert not tally.settled.is_set()
        receive(statistics, records((tally.number, 0, 0, at(0))))
        assert tally.settled.is_set()
        assert list(tally.choices[0].records) == [0, 1]
        assert not statistics.tallies

    assert count(run(folder, test), "tokens_total") == 2


def test_a_request_does_not_wait_longer_than_its_grace(folder: Path) -> None:
    async def test(statistics: StatsCollector) -> None:
        tally = opened(statistics, choices=2)
        tally.choices[0].tokens, tally.choices[1].tokens = 3, 1
        receive(statistics, records((tally.number, 0, 1, at(1)), (tally.number, 1, 0, at(0))))
        statistics.finish(tally, NOW)
        assert not tally.settled.is_set()
        await asyncio.wait_for(tally.settled.wait(), 10)
        assert not statistics.tallies
        receive(statistics, records((tally.number, 0, 0, at(0))))  # too late
        assert list(tally.choices[0].records) == [1]
        assert summarize(0, tally.choices[:1], every_token=False)["missing"] == 2

    registry = run(folder, test)
    assert count(registry, "tokens_total") == 2
    assert count(registry, "missing_tokens_total") == 2


def test_a_request_is_counted_once(folder: Path) -> None:
    """Finished twice, settled by its last record, and then its grace ends."""

    async def test(statistics: StatsCollector) -> None:
        tally = opened(statistics)
        tally.choices[0].tokens = 1
        statistics.finish(tally, NOW)
        statistics.finish(tally, 0.0)
        receive(statistics, records((tally.number, 0, 0, at(3))))
        await asyncio.sleep(2 * NOW)

    registry = run(folder, test)
    assert count(registry, "tokens_total") == 1
    assert count(registry, "steps_total") == 3
    assert count(registry, "missing_tokens_total") == 0


def test_a_request_is_given_one_grace(folder: Path) -> None:
    async def test(statistics: StatsCollector) -> None:
        tally = opened(statistics)
        tally.choices[0].tokens = 1
        statistics.finish(tally, NEVER)
        statistics.finish(tally, 0.0)  # its generator is closed after it has ended
        await asyncio.sleep(NOW)
        assert not tally.settled.is_set()

    run(folder, test)


def test_an_aborted_request_leaves_nothing_behind(folder: Path) -> None:
    async def test(statistics: StatsCollector) -> None:
        tally = opened(statistics)
        assert tally.number in statistics.tallies
        tally.choices[0].tokens = 1  # what the client had got
        receive(statistics, records(*((tally.number, 0, position, at(position)) for position in range(4))))
        statistics.finish(tally, NEVER)
        assert tally.settled.is_set()
        receive(statistics, records((tally.number, 0, 4, at(4))), totals(tally.number, 0, 0, 3))
        assert not statistics.tallies
        assert list(tally.choices[0].records) == [0]

    registry = run(folder, test)
    assert count(registry, "tokens_total") == 1
    assert count(registry, "steps_total") == 0


def test_a_request_without_a_token_does_not_wait(folder: Path) -> None:
    async def test(statistics: StatsCollector) -> None:
        tally = opened(statistics)
        statistics.finish(tally, NEVER)
        assert tally.settled.is_set()
        assert not statistics.tallies

    assert count(run(folder, test), "tokens_total") == 0


def test_a_record_that_fits_nowhere_does_not_end_the_listener(folder: Path) -> None:
    async def test(statistics: StatsCollector) -> None:
        tally = opened(statistics)
        tally.choices[0].tokens = 1
        receive(statistics, records((tally.number, 3, 0, at(0))), totals(tally.number, 3, 0, 1))
        receive(statistics, records((tally.number, 0, 0, at(0))))
        statistics.finish(tally, NEVER)
        assert tally.settled.is_set()

    assert count(run(folder, test), "tokens_total") == 1


def test_totals_and_unsettled_tokens_make_a_reply(folder: Path) -> None:
    async def test(statistics: StatsCollector) -> None:
        tally = opened(statistics, choices=2)
        n, tally.choices[1].tokens = tally.number, 40
        # What fell silent was sent as it stood; one message has records and the totals that stand for some of them.
        receive(statistics, records(*((n, 1, position, (9.0, 9.0, 9)) for position in range(20))))
        receive(statistics, records(*((n, 1, position, at(position)) for position in range(8, 30))), totals(n, 1, 0, 8))
        receive(
            statistics, records(*((n, 1, position, at(position)) for position in range(12, 44))), totals(n, 1, 8, 12)
        )
        statistics.finish(tally, NEVER)
        assert tally.settled.is_set()
        assert tally.choices[0].totals["tokens"][0] == 0

    registry = run(folder, test)
    assert count(registry, "tokens_total") == 40
    assert count(registry, "steps_total") == sum(range(40))
    assert count(registry, "entropy_before_nats_sum") == sum(1.0 + position for position in range(40))
    assert count(registry, "missing_tokens_total") == 0


def test_records_of_unknown_requests_are_ignored(folder: Path) -> None:
    async def test(statistics: StatsCollector) -> None:
        tally = opened(statistics)
        tally.choices[0].tokens = 1
        other = tally.number + 1
        receive(statistics, records((other, 7, 0, at(0)), (2**63, 0, 0, at(0))), totals(other, 3, 0, 2))
        assert not tally.choices[0].records
        receive(statistics, records((other, 0, 0, at(0)), (tally.number, 0, 0, at(2))))
        statistics.finish(tally, NEVER)
        assert tally.settled.is_set()

    assert count(run(folder, test), "steps_total") == 2


def test_requests_are_counted_under_their_method_and_while_they_last(folder: Path) -> None:
    async def test(statistics: StatsCollector) -> None:
        def tracked() -> float | None:
            return statistics.metrics.tracked.labels("m")._value.get()

        first, second = opened(statistics), statistics.tally(AdaptiveTemperatureParams(), 1)
        assert tracked() == 1
        statistics.open(second)
        assert tracked() == 2
        for tally, tokens in ((first, 1), (second, 2)):
            tally.choices[0].tokens = tokens
            receive(statistics, records(*((tally.number, 0, position, at(1)) for position in range(tokens))))
            statistics.finish(tally, NEVER)
        assert tracked() == 0

    registry = run(folder, test)
    assert count(registry, "tokens_total", "em_inf") == 1
    assert count(registry, "tokens_total", "adaptive_temperature") == 2


@pytest.mark.parametrize("finished_first", [True, False])
def test_messages_come_by_the_socket(folder: Path, finished_first: bool) -> None:
    """At once where a reply waits for them; otherwise they are read before long, so that they do not pile up."""

    async def test(statistics: StatsCollector) -> None:
        tally = opened(statistics)
        tally.choices[0].tokens = 3
        if finished_first:
            statistics.finish(tally, NEVER)
        socket = connect(zmq.Context.instance(), f"ipc://{folder}", statistics.channel)
        channel = statistics.channel.encode()
        try:
            # Not from our workers: whoever knows the address, or a worker of a server that was there before.
            socket.send_multipart((b"0" * 32 + b".0", pack([], [totals(tally.number, 0, 0, 3)], 9.0, 9)))
            socket.send(b"")
            socket.send_multipart((channel, pack([], [totals(tally.number, 0, 0, 2)], 0.25, 6)))
            socket.send_multipart((channel, pack([records((tally.number, 0, 2, at(2)))], [], 0.25, 6)))
            while not tally.choices[0].records:
                await asyncio.sleep(0.01)
            statistics.finish(tally, NEVER)
            await asyncio.wait_for(tally.settled.wait(), 10)
        finally:
            socket.close(linger=0)

    registry = run(folder, test)
    assert count(registry, "steps_total") == 0 + 1 + 2
    assert registry.get_sample_value("em_inf_transform_seconds_total", {"model": "m"}) == 0.5
    assert registry.get_sample_value("em_inf_records_dropped_total", {"model": "m"}) == 12


def test_only_a_reply_that_waits_has_the_socket_watched(folder: Path) -> None:
    async def test(statistics: StatsCollector) -> None:
        watched: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.add_reader = lambda *_: watched.append("yes")  # type: ignore[method-assign]
        loop.remove_reader = lambda *_: watched.append("no")  # type: ignore[method-assign, assignment]
        first, second, third = (opened(statistics) for _ in range(3))
        for tally in (first, second, third):
            tally.choices[0].tokens = 1
        receive(statistics, records((first.number, 0, 0, at(0))))
        statistics.finish(first, NEVER)
        assert watched == []
        statistics.finish(second, NEVER)
        statistics.finish(third, NEVER)
        assert watched == ["yes"]
        receive(statistics, records((second.number, 0, 0, at(0))))
        assert watched == ["yes"]
        receive(statistics, records((third.number, 0, 0, at(0))))
        assert watched == ["yes", "no"]

    run(folder, test)


# Summaries


def settled(tokens: int, known: dict[int, Values]) -> ChoiceStats:
    choice = ChoiceStats()
    choice.tokens, choice.records = tokens, dict(known)
    choice.settle()
    return choice


def test_a_summary_has_means_over_the_measured_tokens() -> None:
    choice = settled(4, {0: (2.0, 0.5, 3), 1: (1.0, 0.25, 2), 2: (NAN, NAN, 0), 3: (0.0, 0.0, 0)})
    assert summarize(2, [choice], every_token=False) == {
        "index": 2,
        "tokens": 4,
        "optimized_tokens": 2,
        "missing": 0,
        "entropy_before": 1.0,
        "entropy_after": 0.25,
        "steps": 5,
    }


def test_a_summary_of_every_token_is_aligned_with_the_reply() -> None:
    choice = settled(4, {3: (1.0, 0.1, 2), 1: (NAN, NAN, 0), 0: (0.12345678, 0.0, 1)})
    entry = summarize(0, [choice], every_token=True)
    assert entry["missing"] == 1
    assert entry["per_token"] == [
        {"before": 0.123457, "after": 0.0, "steps": 1},
        {"before": None, "after": None, "steps": 0},
        None,
        {"before": 1.0, "after": 0.1, "steps": 2},
    ]


def test_a_reply_in_several_parts_is_one_entry() -> None:
    """The turns of a conversation with tools, which the engine sees as requests of their own."""
    parts = [settled(2, {0: (2.0, 1.0, 1), 1: (4.0, 1.0, 2)}), settled(3, {2: (0.0, 0.25, 0)}), settled(0, {})]
    entry = summarize(0, parts, every_token=True)
    assert [token and token["steps"] for token in entry.pop("per_token")] == [1, 2, None, None, 0]
    assert entry == {
        "index": 0,
        "tokens": 5,
        "optimized_tokens": 2,
        "missing": 2,
        "entropy_before": 2.0,
        "entropy_after": 0.75,
        "steps": 3,
    }


@pytest.mark.parametrize("known", [{}, {0: (NAN, NAN, 0)}])
def test_without_a_measured_token_there_are_no_means(known: dict[int, Values]) -> None:
    entry = summarize(0, [settled(1, known)], every_token=True)
    assert entry["entropy_before"] is None
    assert entry["entropy_after"] is None
    assert entry["missing"] == 1 - len(known)


def test_a_summary_is_strict_json() -> None:
    """Also where records came as numpy's own numbers would, by a message."""
    tokens = records((0, 0, 0, (1.5, 0.5, 3)), (0, 0, 1, (NAN, NAN, 0)))
    tally = RequestStats(0, "em_inf", 1)
    for _, _, position, *values in tokens.tolist():
        tally.choices[0].records[position] = tuple(values)
    tally.choices[0].add_totals(totals(0, 0, 2, 5)[0])
    tally.choices[0].tokens = 6
    tally.choices[0].settle()
    entry = summarize(0, tally.choices, every_token=True)
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert entry["steps"] == 3 + 2 + 3 + 4
    assert entry["missing"] == 1
