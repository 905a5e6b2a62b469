"""Messages in, summaries out: what a response waits for, what it leaves out, and that nothing stays behind."""

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
from em_sampler.params import CUT, RETURN_ADDRESS_KEY
from em_sampler.stats.aggregator import ReturnAddress
from em_sampler.stats.transport import connect, socket_dir
from em_sampler.stats.wire import (
    CANDIDATES_DTYPE,
    TAIL_TOKENS,
    TOKEN_DTYPE,
    TOTALS_DTYPE,
    VALUES_DTYPE,
    StructuredArray,
    add_tokens,
    pack,
)
from server.stats.collector import ChoiceStats, RequestStats, StatsCollector, TokenStats, summarize
from server.stats.metrics import Metrics

NAN = math.nan
SOON_S = 0.02  # a timeout that a test can wait for
NEVER_S = 1000.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with socket_dir() as path:
        yield Path(path)


def run(folder: Path, test: Callable[[StatsCollector], Awaitable[None]]) -> CollectorRegistry:
    """Run `test` with a new collector; return its metrics."""
    registry = CollectorRegistry()

    async def main() -> None:
        collector = StatsCollector(Metrics("m", registry), f"ipc://{folder}")
        try:
            await test(collector)
        finally:
            asyncio.get_running_loop().remove_reader(collector.socket.getsockopt(zmq.FD))
            collector.socket.close(linger=0)

    asyncio.run(main())
    return registry


def count(registry: CollectorRegistry, name: str, method: str = "em_inf") -> float | None:
    return registry.get_sample_value(f"em_inf_{name}", {"model": "m", "method": method})


def started(collector: StatsCollector, choices: int = 1) -> RequestStats:
    request = collector.new_request(EMInfParams(), choices)
    collector.start(request)
    return request


def at(position: int) -> TokenStats:
    return 1.0 + position, 0.5, position / 4, position


def token_rows(*tokens: tuple[int, int, int, TokenStats]) -> StructuredArray:
    """TOKEN rows, each made of (request number, choice, position, stats)."""
    flat = [(number, choice, position, *stats) for number, choice, position, stats in tokens]
    return np.array(flat, dtype=TOKEN_DTYPE)


def candidate_rows(*tokens: tuple[int, int, int, list[tuple[int, float, float]]]) -> StructuredArray:
    """CANDIDATES rows, each made of (request number, choice, position, [(id, probability before, after)])."""
    rows = np.zeros(len(tokens), dtype=CANDIDATES_DTYPE)
    rows["before"] = rows["after"] = NAN
    for row, (number, choice, position, candidates) in zip(rows, tokens, strict=True):
        row["request_number"], row["choice"], row["position"] = number, choice, position
        for name, values in zip(("id", "before", "after"), zip(*candidates, strict=True), strict=True):
            row[name][: len(values)] = values
    return rows


def totals(number: int, choice: int, first: int, end: int) -> StructuredArray:
    """TOTALS [1] of the positions from `first` to before `end`."""
    row = np.zeros(1, dtype=TOTALS_DTYPE)
    row["request_number"], row["choice"], row["first"], row["end"] = number, choice, first, end
    values = np.array([at(position) for position in range(first, end)], dtype=VALUES_DTYPE)
    add_tokens(row, np.zeros(len(values), dtype=np.intp), values, np.arange(first, end))
    return row


NO_TOKENS, NO_TOTALS = np.zeros(0, TOKEN_DTYPE), np.zeros(0, TOTALS_DTYPE)


def receive(collector: StatsCollector, tokens: StructuredArray = NO_TOKENS, rows: StructuredArray = NO_TOTALS) -> None:
    collector.receive(pack(collector.socket_name, [tokens], [rows], 0.0, 0))


# One choice


def test_a_choice_keeps_the_last_stats_of_a_position() -> None:
    choice = ChoiceStats()
    choice.tokens = 2
    choice.by_position = {1: (9.0, 9.0, 9.0, 9), 0: at(0)}
    choice.by_position[1] = at(1)
    choice.finalize()
    assert list(choice.by_position) == [0, 1]
    assert choice.totals[["tokens", "steps", "before_sum"]].tolist() == [(2, 1, 3.0)]


def test_totals_replace_the_tokens_at_their_positions() -> None:
    choice = ChoiceStats()
    choice.tokens = 6
    choice.by_position = dict.fromkeys(range(1, 6), (9.0, 9.0, 9.0, 9))
    choice.add_totals(totals(0, 0, 0, 4)[0])
    assert sorted(choice.by_position) == [4, 5]
    assert choice.missing() == 0
    choice.finalize()
    assert choice.totals[["tokens", "steps"]].tolist() == [(6, 0 + 1 + 2 + 3 + 9 + 9)]


def test_totals_of_no_tokens_replace_none() -> None:
    choice = ChoiceStats()
    choice.by_position = {0: at(0), 5: at(5)}
    empty = totals(0, 0, 0, 0)
    empty["first"] = np.iinfo(np.uint32).max  # as a worker sends it
    choice.add_totals(empty[0])
    assert sorted(choice.by_position) == [0, 5]


def test_stats_past_the_end_of_the_choice_are_dropped() -> None:
    choice = ChoiceStats()
    choice.tokens = 2
    choice.by_position = {position: at(position) for position in (5, 2, 0)}
    assert choice.missing() == 1  # position 1; those past the end do not count
    choice.finalize()
    assert choice.by_position == {0: at(0)}
    assert choice.totals[["tokens", "steps"]].tolist() == [(1, 0)]


# The requests in flight


def test_a_return_address_leads_to_the_request(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        first, second = (collector.new_request(EMInfParams(), 2) for _ in range(2))
        assert first.number != second.number
        for request, per_token in ((first, True), (second, False)):
            extra_args = collector.return_address(request, per_token).to_extra_args()
            read = ReturnAddress.from_extra_args(extra_args | {"other": 1})
            assert read == ReturnAddress(collector.socket_name, request.number, 0, per_token)
            assert list(extra_args) == [RETURN_ADDRESS_KEY]
        assert (folder / collector.socket_name).is_socket()

    run(folder, test)


def test_a_request_without_missing_stats_is_final_at_once(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector, choices=2)
        request.choices[0].tokens, request.choices[1].tokens = 2, 1
        n = request.number
        receive(collector, token_rows((n, 0, 1, at(1)), (n, 1, 0, at(5)), (n, 0, 0, at(0))))
        assert not request.final.is_set()  # the engine has not finished it
        collector.finish(request, NEVER_S)
        assert request.final.is_set()
        assert request.choices[0].by_position == {0: at(0), 1: at(1)}
        assert request.choices[1].by_position == {0: at(5)}
        assert not collector.requests

    registry = run(folder, test)
    assert count(registry, "tokens_total") == 3
    assert count(registry, "steps_total") == 6
    assert count(registry, "missing_tokens_total") == 0


def test_a_waiting_request_is_final_with_its_last_token(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        request.choices[0].tokens = 2
        receive(collector, token_rows((request.number, 0, 1, at(1))))
        collector.finish(request, NEVER_S)
        assert not request.final.is_set()
        receive(collector, token_rows((request.number, 0, 2, at(2))))  # past the end
        assert not request.final.is_set()
        receive(collector, token_rows((request.number, 0, 0, at(0))))
        assert request.final.is_set()
        assert list(request.choices[0].by_position) == [0, 1]
        assert not collector.requests

    assert count(run(folder, test), "tokens_total") == 2


def test_a_request_does_not_wait_longer_than_its_timeout(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector, choices=2)
        request.choices[0].tokens, request.choices[1].tokens = 3, 1
        receive(collector, token_rows((request.number, 0, 1, at(1)), (request.number, 1, 0, at(0))))
        collector.finish(request, SOON_S)
        assert not request.final.is_set()
        await asyncio.wait_for(request.final.wait(), 10)
        assert not collector.requests
        receive(collector, token_rows((request.number, 0, 0, at(0))))  # too late
        assert list(request.choices[0].by_position) == [1]
        assert summarize(0, request.choices[:1], per_token=False)["missing"] == 2

    registry = run(folder, test)
    assert count(registry, "tokens_total") == 2
    assert count(registry, "missing_tokens_total") == 2


def test_a_request_is_counted_once(folder: Path) -> None:
    """Finished twice, final with its last token, and then its timeout ends."""

    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        request.choices[0].tokens = 1
        collector.finish(request, SOON_S)
        collector.finish(request, 0.0)
        receive(collector, token_rows((request.number, 0, 0, at(3))))
        await asyncio.sleep(2 * SOON_S)

    registry = run(folder, test)
    assert count(registry, "tokens_total") == 1
    assert count(registry, "steps_total") == 3
    assert count(registry, "missing_tokens_total") == 0


def test_a_request_has_one_timeout(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        request.choices[0].tokens = 1
        collector.finish(request, NEVER_S)
        collector.finish(request, 0.0)  # its generator is closed after it has ended
        await asyncio.sleep(SOON_S)
        assert not request.final.is_set()

    run(folder, test)


def test_an_aborted_request_leaves_nothing_behind(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        assert request.number in collector.requests
        request.choices[0].tokens = 1  # what the client had got
        receive(collector, token_rows(*((request.number, 0, position, at(position)) for position in range(4))))
        collector.finish(request, NEVER_S)
        assert request.final.is_set()
        receive(collector, token_rows((request.number, 0, 4, at(4))), totals(request.number, 0, 0, 3))
        assert not collector.requests
        assert list(request.choices[0].by_position) == [0]

    registry = run(folder, test)
    assert count(registry, "tokens_total") == 1
    assert count(registry, "steps_total") == 0


def test_a_request_without_a_token_does_not_wait(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        collector.finish(request, NEVER_S)
        assert request.final.is_set()
        assert not collector.requests

    assert count(run(folder, test), "tokens_total") == 0


def test_stats_of_an_unknown_choice_do_not_stop_the_collector(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        request.choices[0].tokens = 1
        receive(collector, token_rows((request.number, 3, 0, at(0))), totals(request.number, 3, 0, 1))
        receive(collector, token_rows((request.number, 0, 0, at(0))))
        collector.finish(request, NEVER_S)
        assert request.final.is_set()

    assert count(run(folder, test), "tokens_total") == 1


def test_totals_and_tokens_that_were_not_final_make_a_choice(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector, choices=2)
        n, request.choices[1].tokens = request.number, 40
        # Tokens of an idle request are sent although not final; a message may have totals that replace some of them.
        receive(collector, token_rows(*((n, 1, position, (9.0, 9.0, 9.0, 9)) for position in range(20))))
        receive(
            collector, token_rows(*((n, 1, position, at(position)) for position in range(8, 30))), totals(n, 1, 0, 8)
        )
        receive(
            collector, token_rows(*((n, 1, position, at(position)) for position in range(12, 44))), totals(n, 1, 8, 12)
        )
        collector.finish(request, NEVER_S)
        assert request.final.is_set()
        assert request.choices[0].totals["tokens"][0] == 0

    registry = run(folder, test)
    assert count(registry, "tokens_total") == 40
    assert count(registry, "steps_total") == sum(range(40))
    assert count(registry, "entropy_before_nats_sum") == sum(1.0 + position for position in range(40))
    assert count(registry, "missing_tokens_total") == 0


def test_stats_of_unknown_requests_are_ignored(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        request.choices[0].tokens = 1
        other = request.number + 1
        receive(collector, token_rows((other, 7, 0, at(0)), (2**63, 0, 0, at(0))), totals(other, 3, 0, 2))
        assert not request.choices[0].by_position
        receive(collector, token_rows((other, 0, 0, at(0)), (request.number, 0, 0, at(2))))
        collector.finish(request, NEVER_S)
        assert request.final.is_set()

    assert count(run(folder, test), "steps_total") == 2


def test_requests_are_counted_under_their_method_and_while_they_last(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        def tracked() -> float | None:
            return collector.metrics.tracked.labels("m")._value.get()

        first, second = started(collector), collector.new_request(AdaptiveTemperatureParams(), 1)
        assert tracked() == 1
        collector.start(second)
        assert tracked() == 2
        for request, tokens in ((first, 1), (second, 2)):
            request.choices[0].tokens = tokens
            receive(collector, token_rows(*((request.number, 0, position, at(1)) for position in range(tokens))))
            collector.finish(request, NEVER_S)
        assert tracked() == 0

    registry = run(folder, test)
    assert count(registry, "tokens_total", "em_inf") == 1
    assert count(registry, "tokens_total", "adaptive_temperature") == 2


@pytest.mark.parametrize("finished_first", [True, False])
def test_messages_arrive_by_the_socket(folder: Path, finished_first: bool) -> None:
    """At once if a response waits for them; otherwise they are read from time to time, so that they do not pile up."""

    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        request.choices[0].tokens = 3
        if finished_first:
            collector.finish(request, NEVER_S)
        socket = connect(zmq.Context.instance(), f"ipc://{folder}", collector.socket_name)
        name = collector.socket_name
        try:
            # Not from our workers: whoever knows the address, or a worker of a server that was there before.
            socket.send(pack("0" * 32 + ".0", [], [totals(request.number, 0, 0, 3)], 9.0, 9))
            socket.send(b"")
            socket.send(pack(name, [], [totals(request.number, 0, 0, 2)], 0.25, 6))
            socket.send(pack(name, [token_rows((request.number, 0, 2, at(2)))], [], 0.25, 6))
            while not request.choices[0].by_position:
                await asyncio.sleep(0.01)
            collector.finish(request, NEVER_S)
            await asyncio.wait_for(request.final.wait(), 10)
        finally:
            socket.close(linger=0)

    registry = run(folder, test)
    assert count(registry, "steps_total") == 0 + 1 + 2
    assert registry.get_sample_value("em_inf_transform_seconds_total", {"model": "m"}) == 0.5
    assert registry.get_sample_value("em_inf_records_dropped_total", {"model": "m"}) == 12


def test_the_socket_is_watched_while_a_response_waits_or_none_is_expected(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        watched: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.add_reader = lambda *_: watched.append("yes")  # type: ignore[method-assign]
        loop.remove_reader = lambda *_: watched.append("no")  # type: ignore[method-assign, assignment]
        first, second, third = (started(collector) for _ in range(3))
        for request in (first, second, third):
            request.choices[0].tokens = 1
        receive(collector, token_rows((first.number, 0, 0, at(0))))
        collector.finish(first, NEVER_S)
        assert watched == ["no"]
        collector.finish(second, NEVER_S)
        collector.finish(third, NEVER_S)
        assert watched == ["no", "yes"]
        receive(collector, token_rows((second.number, 0, 0, at(0))))
        receive(collector, token_rows((third.number, 0, 0, at(0))))
        assert watched == ["no", "yes"]  # and stays so: nothing is in flight
        started(collector)
        assert watched == ["no", "yes", "no"]

    run(folder, test)


# Summaries


def finalized(tokens: int, known: dict[int, TokenStats]) -> ChoiceStats:
    choice = ChoiceStats()
    choice.tokens, choice.by_position = tokens, dict(known)
    choice.finalize()
    return choice


def test_a_summary_has_means_over_the_measured_tokens() -> None:
    choice = finalized(
        4, {0: (2.0, 0.5, 1.5, 3), 1: (1.0, 0.25, 0.75, 2), 2: (NAN, NAN, NAN, 0), 3: (0.0, 0.0, 0.0, CUT)}
    )
    assert summarize(2, [choice], per_token=False) == {
        "index": 2,
        "tokens": 4,
        "optimized_tokens": 3,
        "missing": 0,
        "entropy_before": 1.0,
        "entropy_after": 0.25,
        "entropy_max": 2.0,
        "entropy_max_position": 0,
        "entropy_tail": 1.0,
        "varentropy": 0.75,
        "steps": 5,
    }


def test_a_summary_of_every_token_is_aligned_with_the_choice() -> None:
    choice = finalized(4, {3: (1.0, 0.1, 0.5, 2), 1: (NAN, NAN, NAN, 0), 0: (0.12345678, 0.0, 0.0, CUT)})
    summary = summarize(0, [choice], per_token=True)
    assert summary["missing"] == 1
    assert summary["per_token"] == [
        {"before": 0.123457, "after": 0.0, "varentropy": 0.0, "steps": 0},
        {"before": None, "after": None, "varentropy": None, "steps": 0},
        None,
        {"before": 1.0, "after": 0.1, "varentropy": 0.5, "steps": 2},
    ]


def test_a_summary_of_every_token_has_the_candidates_that_were_asked_for() -> None:
    choice = finalized(3, dict.fromkeys((0, 1), (1.0, 0.5, 0.0, 1)))
    found = [(7, 0.12345678, 1.0000001), (3, 0.1, 0.0), (9, 1e-9, 0.0)]
    choice.candidates = {0: candidate_rows((0, 0, 0, found))[0]}  # of token 1, they were lost
    first, second, third = summarize(0, [choice], True, 2, lambda ids: {i: f"<{i}>" for i in ids})["per_token"]
    assert first["top"] == [
        {"id": 7, "token": "<7>", "before": 0.123457, "after": 1.0},
        {"id": 3, "token": "<3>", "before": 0.1, "after": 0.0},
    ]
    assert (second["top"], third) == (None, None)
    [more, *_] = summarize(0, [choice], True, 20)["per_token"]  # a server without a tokenizer
    assert more["top"][2] == {"id": 9, "token": None, "before": 1e-9, "after": 0.0}
    assert len(more["top"]) == 3
    assert "top" not in summarize(0, [choice], True)["per_token"][0]


def test_a_choice_in_several_parts_has_one_summary() -> None:
    """The turns of a conversation with tools: one engine request each."""
    parts = [
        finalized(2, {0: (2.0, 1.0, 1.0, 1), 1: (4.0, 1.0, 2.0, 2)}),
        finalized(3, {2: (3.0, 0.25, 0.0, 0)}),
        finalized(0, {}),
    ]
    summary = summarize(0, parts, per_token=True)
    assert [token and token["steps"] for token in summary.pop("per_token")] == [1, 2, None, None, 0]
    assert summary == {
        "index": 0,
        "tokens": 5,
        "optimized_tokens": 2,
        "missing": 2,
        "entropy_before": 3.0,
        "entropy_after": 0.75,
        "entropy_max": 4.0,
        "entropy_max_position": 1,
        "entropy_tail": 3.0,
        "varentropy": 1.0,
        "steps": 3,
    }


def test_a_varentropy_that_was_not_asked_for_is_null() -> None:
    """As in the span of a request without stats."""
    choice = finalized(2, {0: (2.0, 0.5, NAN, 3), 1: (1.0, 0.25, NAN, 2)})
    summary = summarize(0, [choice], per_token=False)
    assert (summary["varentropy"], summary["entropy_max"]) == (None, 2.0)


def test_the_tail_is_the_last_tokens_of_the_choice_over_all_its_parts() -> None:
    def part(tokens: int, entropy: float) -> ChoiceStats:
        return finalized(tokens, {i: (entropy + i, 0.0, 0.0, 0) for i in range(tokens)})

    assert summarize(0, [part(TAIL_TOKENS, 2.0)], per_token=False)["entropy_tail"] == 2.0 + (TAIL_TOKENS - 1) / 2
    parts = [part(100, 0.0), part(TAIL_TOKENS - 2, 7.0)]
    tail = [98.0, 99.0, *(7.0 + i for i in range(TAIL_TOKENS - 2))]
    summary = summarize(0, parts, per_token=False)
    assert summary["entropy_tail"] == pytest.approx(sum(tail) / TAIL_TOKENS)
    assert (summary["entropy_max"], summary["entropy_max_position"]) == (99.0, 99)


@pytest.mark.parametrize("known", [{}, {0: (NAN, NAN, NAN, 0)}])
def test_without_a_measured_token_there_are_no_means(known: dict[int, TokenStats]) -> None:
    summary = summarize(0, [finalized(1, known)], per_token=True)
    names = ("entropy_before", "entropy_after", "entropy_max", "entropy_max_position", "entropy_tail", "varentropy")
    assert [summary[name] for name in names] == [None] * len(names)
    assert summary["missing"] == 1 - len(known)


def test_a_summary_is_strict_json() -> None:
    """Also for stats that come as NumPy's numbers, out of a message."""
    tokens = token_rows((0, 0, 0, (1.5, 0.5, 0.25, 3)), (0, 0, 1, (NAN, NAN, NAN, 0)))
    request = RequestStats(0, "em_inf", 1)
    for _, _, position, *values in tokens.tolist():
        request.choices[0].by_position[position] = tuple(values)
    request.choices[0].add_totals(totals(0, 0, 2, 5)[0])
    request.choices[0].tokens = 6
    request.choices[0].finalize()
    summary = summarize(0, request.choices, per_token=True)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["steps"] == 3 + 2 + 3 + 4
    assert summary["missing"] == 1
