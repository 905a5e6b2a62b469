"""Whatever comes by the socket: no exception, the loop goes on, and the messages after it are taken in."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from em_sampler.params import CUT
from em_sampler.stats.curve import KEY_ENV
from em_sampler.stats.transport import connect, socket_dir
from em_sampler.stats.wire import HEADER_DTYPE, MAX_POSITION, MAX_ROWS, REJECTION_REASONS, TOKEN_DTYPE, VERSION, pack
from harness.ports import free_port
from server.stats import collector as collector_module
from server.stats.collector import MAX_FRAMES_PER_TURN, StatsCollector, summarize
from server.stats.metrics import Metrics
from tests.server.metrics_page import series
from tests.server.stats.test_collector import NEVER_S, at, candidate_rows, run, started, token_rows, totals

Socket = zmq.Socket[bytes]
PATIENCE_S = 60  # for what would otherwise hang


@pytest.fixture
def folder() -> Iterator[Path]:
    with socket_dir() as path:
        yield Path(path)


def rejected(registry: CollectorRegistry) -> dict[str, float]:
    """How many messages were rejected, by the reasons for which any was."""
    name = "em_inf_messages_rejected_total"
    found = {reason: registry.get_sample_value(name, {"model": "m", "reason": reason}) for reason in REJECTION_REASONS}
    return {reason: value for reason, value in found.items() if value}


def take(collector: StatsCollector, message: bytes) -> None:
    """Take in a frame as the socket's reader does."""
    collector._take(message)


def a_message(collector: StatsCollector, number: int) -> bytes:
    tokens = token_rows((number, 0, 0, at(0)), (number, 0, 1, at(1)))
    candidates = candidate_rows((number, 0, 0, [(5, 0.5, 0.75)]))
    return pack(collector.socket_name, [tokens], [totals(number, 0, 2, 5)], 0.5, 1, [candidates])


mutations = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 10**4), st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("cut"), st.integers(0, 10**4), st.just(b"")),
        st.tuples(st.just("insert"), st.integers(0, 10**4), st.binary(max_size=400)),
    ),
    min_size=1,
    max_size=5,
)


def mutated(message: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, content in changes:
        place %= len(message) + 1
        end = {"set": place + len(content), "cut": len(message), "insert": place}[kind]
        message = message[:place] + content + message[end:]
    return message


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(hostile=st.lists(st.one_of(st.binary(max_size=200), mutations), min_size=1, max_size=8))
def test_no_bytes_disturb_a_request(folder: Path, hostile: list[bytes | list[tuple[str, int, bytes]]]) -> None:
    async def test(collector: StatsCollector) -> None:
        victim, request = started(collector), started(collector)
        for each in hostile:
            take(collector, each if isinstance(each, bytes) else mutated(a_message(collector, victim.number), each))
        victim.choices[0].tokens = request.choices[0].tokens = 5
        take(collector, a_message(collector, request.number))
        collector.finish(victim, NEVER_S)
        collector.finish(request, NEVER_S)
        assert request.final.is_set()
        victim_summary = summarize(0, victim.choices, per_token=True)  # may be wrong, must be there
        assert len(victim_summary["per_token"]) == 5

    metrics = series(run(folder, test))
    assert all(math.isfinite(value) and value >= 0 for value in metrics.values()), metrics
    assert metrics["em_inf_tokens_total", "em_inf", "m"] >= 5


def test_a_message_is_rejected_for_its_reason(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        good = a_message(collector, request.number)
        header = np.frombuffer(good, HEADER_DTYPE, count=1).copy()
        header["version"] = VERSION + 1
        rest = good[HEADER_DTYPE.itemsize :]
        take(collector, header.tobytes() + rest)
        take(collector, pack("f" * 32 + ".0", [], [], 0.0, 0))
        for message in (b"", b"EMST", good[:-1], good + b"x", b"?" + good[1:]):
            take(collector, message)
        many = np.zeros(MAX_ROWS + 1, dtype=TOKEN_DTYPE)
        take(collector, pack(collector.socket_name, [many], [], 0.0, 0))
        for seconds in (math.nan, math.inf, -1.0):
            take(collector, pack(collector.socket_name, [], [], seconds, 0))
        assert not request.choices[0].by_position
        take(collector, good)
        assert sorted(request.choices[0].by_position) == [0, 1]

    assert rejected(run(folder, test)) == {"version": 1, "recipient": 1, "malformed": 6, "out_of_range": 3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position", MAX_POSITION),
        ("steps", CUT - 1),
        ("steps", 65),
        ("before", math.inf),
        ("before", math.nan),  # alone
        ("after", math.nan),
        ("after", -math.inf),
        ("varentropy", math.inf),
    ],
)
def test_a_token_out_of_range_is_dropped_alone(field: str, value: float, folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        tokens = token_rows(*((request.number, 0, position, at(position)) for position in range(3)))
        tokens[field][1] = value
        take(collector, pack(collector.socket_name, [tokens], [], 0.0, 0))
        assert request.choices[0].by_position == {0: at(0), 2: at(2)}

    assert rejected(run(folder, test)) == {"out_of_range": 1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position", MAX_POSITION),
        ("before", math.inf),
        ("before", -0.5),
        ("after", 1.5),
        ("after", math.nan),  # alone
    ],
)
def test_candidates_out_of_range_are_dropped_alone(field: str, value: float, folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        rows = candidate_rows(*((request.number, 0, position, [(5, 0.5, 0.75)]) for position in range(3)))
        rows[field][1] = value
        take(collector, pack(collector.socket_name, [], [], 0.0, 0, [rows]))
        assert sorted(request.choices[0].candidates) == [0, 2]

    assert rejected(run(folder, test)) == {"out_of_range": 1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("end", 2**32 - 1),
        ("first", 6),
        ("tokens", 6),
        ("optimized", 6),
        ("passed_through", 2**64 - 1),
        ("steps", 5 * 64 + 1),
        ("before_sum", math.nan),
        ("after_sum", math.inf),
        ("reduction_sum", -501.0),
        ("after_counts", 1),
        ("varentropy_sum", math.inf),
        ("highest", math.nan),
        ("highest", -1.0),
        ("highest_position", MAX_POSITION),
    ],
)
def test_totals_out_of_range_are_dropped(field: str, value: float, folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        row = totals(request.number, 0, 0, 5)
        row[field] = value
        take(collector, pack(collector.socket_name, [], [row], 0.0, 0))
        assert request.choices[0].totals["tokens"][0] == 0
        take(collector, pack(collector.socket_name, [], [totals(request.number, 0, 0, 5)], 0.0, 0))
        assert request.choices[0].totals["tokens"][0] == 5

    assert rejected(run(folder, test)) == {"out_of_range": 1}


def test_totals_over_many_positions_take_no_longer_than_over_few(folder: Path) -> None:
    """The work is by the tokens that are known, not by the range that a message names."""

    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        row = totals(request.number, 0, 0, 1)
        row["end"] = MAX_POSITION
        take(collector, pack(collector.socket_name, [], [row] * MAX_ROWS, 0.0, 0))  # 34 billion positions
        assert request.choices[0].totals["tokens"][0] == MAX_ROWS

    run(folder, test)


def test_a_spoofed_request_number_makes_wrong_stats_and_no_more(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        victim, other = started(collector), started(collector)
        victim.choices[0].tokens = other.choices[0].tokens = 1
        take(
            collector, pack(collector.socket_name, [token_rows((victim.number, 0, 0, (9.0, 9.0, 9.0, 9)))], [], 0.0, 0)
        )
        take(collector, pack(collector.socket_name, [token_rows((other.number, 0, 0, at(0)))], [], 0.0, 0))
        for request in (victim, other):
            collector.finish(request, NEVER_S)
            assert request.final.is_set()
        assert victim.choices[0].by_position == {0: (9.0, 9.0, 9.0, 9)}
        assert other.choices[0].by_position == {0: at(0)}

    run(folder, test)


# By the socket


async def until(collector: StatsCollector, position: int, number: int) -> int:
    """Wait until the request has this position; how many turns the loop took."""
    turns = 0
    async with asyncio.timeout(PATIENCE_S):
        while position not in collector.requests[number].choices[0].by_position:
            await asyncio.sleep(0)
            turns += 1
    return turns


def test_a_flood_is_read_little_by_little(folder: Path) -> None:
    """Between two turns of the loop, no more than MAX_FRAMES_PER_TURN; and what a worker sends after it arrives."""
    flood = 200

    async def test(collector: StatsCollector) -> None:
        taken: list[bytes] = []
        take, collector._take = collector._take, lambda frame: (taken.append(frame), take(frame))[1]  # type: ignore[method-assign, func-returns-value]
        request = started(collector)
        end = connect(zmq.Context.instance(), f"ipc://{folder}", collector.socket_name)
        try:
            for _ in range(flood):
                end.send(b"x")
            end.send(pack(collector.socket_name, [token_rows((request.number, 0, 0, at(0)))], [], 0.0, 0))
            before = 0
            async with asyncio.timeout(PATIENCE_S):
                while not request.choices[0].by_position:
                    await asyncio.sleep(0)
                    # A poll and the turn that goes on reading may share one turn of the loop.
                    assert len(taken) - before <= 2 * MAX_FRAMES_PER_TURN
                    before = len(taken)
        finally:
            end.close(linger=0)

    assert rejected(run(folder, test)) == {"malformed": flood}


def test_an_idle_server_reads_what_comes(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        end = connect(zmq.Context.instance(), f"ipc://{folder}", collector.socket_name)
        try:
            for _ in range(60):
                end.send(bytes(2**19))
            async with asyncio.timeout(PATIENCE_S):
                while rejected(registry_of(collector)) != {"malformed": 60}:
                    await asyncio.sleep(0.01)
        finally:
            end.close(linger=0)

    assert rejected(run(folder, test)) == {"malformed": 60}


def registry_of(collector: StatsCollector) -> Any:
    """The counter's own values, in the shape of a registry."""

    class Values:
        def get_sample_value(self, name: str, labels: dict[str, str]) -> float:
            value: float = collector.metrics.messages_rejected.labels(**labels)._value.get()
            return value

    return Values()


def test_a_message_of_several_frames_is_dropped_as_it_is_read(folder: Path) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        end = connect(zmq.Context.instance(), f"ipc://{folder}", collector.socket_name)
        try:
            good = pack(collector.socket_name, [token_rows((request.number, 0, 7, at(7)))], [], 0.0, 0)
            end.send_multipart([good] * 100)
            end.send(pack(collector.socket_name, [token_rows((request.number, 0, 0, at(0)))], [], 0.0, 0))
            await until(collector, 0, request.number)
            assert list(request.choices[0].by_position) == [0]
        finally:
            end.close(linger=0)

    assert rejected(run(folder, test)) == {"malformed": 1}


def test_a_fault_while_a_message_is_taken_in_does_not_stop_the_reading(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(collector: StatsCollector) -> None:
        request = started(collector)
        end = connect(zmq.Context.instance(), f"ipc://{folder}", collector.socket_name)
        try:
            with monkeypatch.context() as patched:
                patched.setattr(collector_module, "unpack", fail)
                end.send(b"anything")
                async with asyncio.timeout(PATIENCE_S):
                    while "out of memory" not in caplog.text:
                        await asyncio.sleep(0.01)
            end.send(pack(collector.socket_name, [token_rows((request.number, 0, 0, at(0)))], [], 0.0, 0))
            await until(collector, 0, request.number)
        finally:
            end.close(linger=0)

    run(folder, test)


def fail(*_: object) -> None:
    raise MemoryError("out of memory")


def test_strangers_do_not_reach_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """By TCP: three that flood, one whose message never ends, while a worker's stats arrive."""
    monkeypatch.setenv(KEY_ENV, "k" * 32)
    address = f"tcp://127.0.0.1:{free_port()}"
    context: zmq.Context[Socket] = zmq.Context()

    async def main() -> None:
        collector = StatsCollector(Metrics("m", registry), address)
        taken: list[bytes] = []
        take, collector._take = collector._take, lambda frame: (taken.append(frame), take(frame))[1]  # type: ignore[method-assign, func-returns-value]
        request = started(collector)
        strangers = [context.socket(zmq.PUSH) for _ in range(4)]
        worker = connect(context, address, collector.socket_name)
        try:
            for stranger in strangers:
                stranger.connect(address)
            for position in range(20):
                for stranger in strangers[:3]:
                    send_what_goes(stranger, b"x", 0)
                send_what_goes(strangers[3], bytes(2**16), zmq.SNDMORE)
                worker.send(pack(collector.socket_name, [token_rows((request.number, 0, position, at(0)))], [], 0.0, 0))
                await until(collector, position, request.number)
            assert len(taken) == 20
        finally:
            asyncio.get_running_loop().remove_reader(collector.socket.getsockopt(zmq.FD))
            for socket in (*strangers, worker, collector.socket):
                socket.close(linger=0)

    registry = CollectorRegistry()
    asyncio.run(main())
    assert rejected(registry) == {}


def send_what_goes(end: Socket, frame: bytes, flags: int) -> None:
    for _ in range(50):
        try:
            end.send(frame, flags | zmq.NOBLOCK)
        except zmq.Again:
            return
