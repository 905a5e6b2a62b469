"""The way of a statistic from the sampler to a socket: what is kept, what is sent, what is lost and counted."""

import contextlib
import math
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from em_sampler.params import RETURN_ADDRESS_KEY
from em_sampler.stats.aggregator import FINAL_AFTER_TOKENS, ReturnAddress, SlotTable
from em_sampler.stats.recorder import (
    MAX_IN_FLIGHT_STEPS,
    StatsRecorder,
    StepBuffer,
)
from em_sampler.stats.transport import ADDRESS_ENV, SOCKET_DIR_ENV, listen, parse_address, socket_dir
from em_sampler.stats.wire import (
    SUMMED_FIELDS,
    TOKEN_DTYPE,
    TOTALS_DTYPE,
    VALUES_DTYPE,
    StructuredArray,
    add_tokens,
    unpack,
)
from em_sampler.transforms.batch import TransformOutput
from harness.ports import free_port
from server.stats.collector import ChoiceStats

CPU, NAN = torch.device("cpu"), math.nan
DEVICE = torch.device(os.environ.get("EM_TEST_DEVICE", "cpu"))  # benchmarks/gpu.sh asks for "cuda"
ONE, OTHER = "0123456789abcdef" * 2 + ".0", "f" * 32 + ".1"
Values = tuple[float, float, int]


def report(request: int, every_token: bool = False, choice: int = 0, channel: str = ONE) -> ReturnAddress:
    return ReturnAddress(channel, request, choice, every_token)


# What a request carries


def test_a_report_is_read_as_the_server_left_it() -> None:
    assert ReturnAddress.of({RETURN_ADDRESS_KEY: [ONE, 7, 2, True], "em_inf": {}}) == ReturnAddress(ONE, 7, 2, True)
    assert ReturnAddress.of({RETURN_ADDRESS_KEY: (ONE, 0, 0, False)}) == ReturnAddress(ONE, 0, 0, False)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        7,
        ONE,
        [],
        {"channel": ONE},
        [ONE],
        [ONE, 7, 2],
        [ONE, 7, 2, True, True],
        [7, 7, 2, True],
        [ONE, "7", 2, True],
        [ONE, -1, 2, True],
        [ONE, 2**64, 2, True],
        [ONE, 7, -1, True],
        [ONE, 7, 2**32, True],
        [ONE, 7.0, 2, True],
        [ONE, 7, None, True],
        [ONE, 7, 2, 1],
        [ONE, 7, 2, "true"],
        [ONE[1:], 7, 2, True],
        [ONE + "0", 7, 2, True],
        [ONE + "\n", 7, 2, True],
        [ONE.upper(), 7, 2, True],
        ["../../../../../../../tmp/a-socket", 7, 2, True],
        ["", 7, 2, True],
    ],
)
def test_a_report_that_the_server_cannot_have_left_is_none(value: object) -> None:
    assert ReturnAddress.of({RETURN_ADDRESS_KEY: value}) is None


@pytest.mark.parametrize("extra_args", [None, {}, {"em_inf": {"stats": "tokens"}}])
def test_a_request_without_a_report_has_none(extra_args: dict[str, Any] | None) -> None:
    assert ReturnAddress.of(extra_args) is None


# What is kept


def slots_of(*reports: ReturnAddress | None) -> SlotTable:
    slots = SlotTable(len(reports))
    for slot, wanted in enumerate(reports):
        slots.bind(slot, wanted)
    return slots


def add(slots: SlotTable, *tokens: tuple[int, int, Values]) -> None:
    """One step's tokens, each (slot, position, values)."""
    where, positions, values = zip(*tokens, strict=True)
    before, after, steps = (np.array(column) for column in zip(*values, strict=True))
    entropies = (column.astype(np.float32).view(np.int32) for column in (before, after))
    slots.add(np.stack([np.array(where), np.array(positions), *entropies, steps]).astype(np.int32))


def sent(slots: SlotTable, channel: str = ONE) -> tuple[list[tuple[Any, ...]], StructuredArray]:
    """(tokens, totals) that an account has to send; they are sent by this."""
    account = slots.accounts[channel]
    tokens, totals = ([*parts] for parts in (account.tokens, account.totals))
    account.tokens, account.totals = [], []
    return read(np.concatenate([np.zeros(0, TOKEN_DTYPE), *tokens])), np.concatenate(
        [np.zeros(0, TOTALS_DTYPE), *totals]
    )


def settled(slots: SlotTable) -> tuple[list[tuple[Any, ...]], StructuredArray]:
    slots.accounts[ONE].settle()
    return sent(slots)


def read(tokens: StructuredArray) -> list[tuple[Any, ...]]:
    return [(request, choice, position, *values) for request, choice, position, *values in tokens.tolist()]


def at(position: int) -> Values:
    return 1.0 + position, 0.5, position


def reply(request: int, positions: Iterable[int], choice: int = 0) -> list[tuple[Any, ...]]:
    return [(request, choice, position, *at(position)) for position in positions]


def test_a_slot_that_sends_every_token_keeps_none() -> None:
    slots = slots_of(None, report(7, every_token=True, choice=2), None)
    add(slots, (1, 0, (1.5, 0.5, 3)), (0, 4, at(4)), (1, 1, at(1)), (1, -1, at(9)), (-1, 3, at(3)))
    assert not slots.accounts[ONE].waiting()
    assert sent(slots)[0] == [(7, 2, 0, 1.5, 0.5, 3), (7, 2, 1, *at(1))]


def test_a_token_that_was_not_measured_stays_so() -> None:
    slots = slots_of(report(7, every_token=True))
    add(slots, (0, 0, (NAN, NAN, 0)))
    assert repr(sent(slots)[0]) == "[(7, 0, 0, nan, nan, 0)]"


def test_tokens_for_totals_wait_until_their_request_is_silent() -> None:
    slots = slots_of(None, None, report(7, choice=1))
    for position in range(3):
        add(slots, (2, position, at(position)), (2, -1, at(50)))
    assert sent(slots)[0] == []
    assert slots.accounts[ONE].waiting()
    assert settled(slots)[0] == []  # there were new ones
    tokens, totals = settled(slots)
    assert tokens == reply(7, range(3), choice=1)
    assert len(totals) == 0
    assert not slots.accounts[ONE].waiting()


def test_the_last_token_of_a_position_is_the_one_that_counts() -> None:
    slots = slots_of(report(7))
    add(slots, *((0, position, (9.0, 9.0, 9)) for position in range(4)))  # a draft, rejected from its second token
    add(slots, *((0, position, at(position)) for position in range(1, 3)))
    settled(slots)
    add(slots, (0, 3, at(3)))
    settled(slots)
    assert settled(slots)[0] == [(7, 0, 0, 9.0, 9.0, 9), *reply(7, range(1, 4))]


def test_a_token_is_settled_a_window_later() -> None:
    slots = slots_of(report(7), report(7, choice=1))
    for position in range(FINAL_AFTER_TOKENS):
        add(slots, (0, position, at(position)), (1, position, at(position)))
    assert len(settled(slots)[1]) == 0
    for position in range(FINAL_AFTER_TOKENS, FINAL_AFTER_TOKENS + 3):
        add(slots, (0, position, at(position)))
    _, totals = settled(slots)
    assert totals[["request", "choice", "first", "upto", "tokens", "steps"]].tolist() == [(7, 0, 0, 3, 3, 0 + 1 + 2)]
    assert totals["before_sum"][0] == 1.0 + 2.0 + 3.0
    assert settled(slots)[0] == reply(7, range(3, FINAL_AFTER_TOKENS + 3))  # the other sample was silent before


def test_totals_are_of_what_was_settled_since() -> None:
    slots = slots_of(report(7))
    for position in range(FINAL_AFTER_TOKENS + 3):
        add(slots, (0, position, at(position)))
    settled(slots)
    for position in range(FINAL_AFTER_TOKENS + 3, FINAL_AFTER_TOKENS + 5):
        add(slots, (0, position, at(position)))
    _, totals = settled(slots)
    assert totals[["request", "first", "upto", "tokens", "steps"]].tolist() == [(7, 3, 5, 2, 3 + 4)]
    assert settled(slots)[0] == reply(7, range(5, FINAL_AFTER_TOKENS + 5))


def test_what_is_kept_belongs_to_its_request_whoever_has_the_slot() -> None:
    slots = slots_of(report(7))
    add(slots, (0, 0, at(0)))
    slots.bind(0, report(8, choice=3))
    add(slots, (0, 0, at(0)))
    slots.bind(0, None)
    add(slots, (0, 1, at(1)))
    settled(slots)
    assert settled(slots)[0] == [*reply(7, [0]), *reply(8, [0], choice=3)]


class Sampled:
    """A request as the engine has it: how long its reply is, and what was last sampled for each position."""

    def __init__(self, name: ReturnAddress) -> None:
        self.report = name
        self.length = 0
        self.last: dict[int, Values] = {}


class Engine:
    """Slots with requests, and a server that gets what is sent of them."""

    def __init__(self, count: int) -> None:
        self.slots = SlotTable(count)
        self.held: list[Sampled | None] = [None] * count
        self.requests: list[Sampled] = []
        self.received: dict[tuple[int, int], ChoiceStats] = {}
        self.count = 0

    def step(self, slot: int, drafts: int, accepted: int) -> list[tuple[int, int, Values]]:
        """One step's rows of a slot: `drafts` tokens beside the next, of which `accepted` are taken."""
        request = self.held[slot]
        if request is None:
            return [(slot, self.count % 5, self.value())]  # of a request without a report
        rows = [(slot, request.length + i, self.value()) for i in range(drafts + 1)]
        request.last |= {position: values for _, position, values in rows}
        request.length += 1 + min(accepted, drafts)
        return rows

    def value(self) -> Values:
        """Unlike any other; sums of such entropies are exact."""
        self.count += 1
        return (NAN, NAN, 0) if self.count % 11 == 0 else (self.count / 64, self.count % 7 / 64, self.count % 4)

    def deliver(self, settle: bool) -> None:
        """As `server.stats.collector.Statistics.receive` takes a message in."""
        for account in self.slots.accounts.values():
            if settle:
                account.settle()
            tokens, totals = sent(self.slots)
            for row in totals:
                self.received.setdefault((int(row["request"]), int(row["choice"])), ChoiceStats()).add_totals(row)
            for request, choice, position, *values in tokens:
                self.received.setdefault((request, choice), ChoiceStats()).records[position] = tuple(values)

    def bind(self, slot: int, request: Sampled | None) -> None:
        self.slots.bind(slot, request and request.report)
        self.held[slot] = request
        if request and request not in self.requests:
            self.requests.append(request)

    def move(self, source: int, target: int, again: int) -> None:
        """Preempt a request and resume it elsewhere, the last of its tokens sampled again."""
        request = self.held[source]
        self.bind(source, None)
        if request:
            request.length = max(0, request.length - again)
        self.bind(target, request)


SLOTS = 3
slots = st.integers(0, SLOTS - 1)
few = st.integers(0, 3)
actions = st.one_of(
    st.tuples(st.just("step"), st.lists(st.tuples(st.integers(0, 3), few), min_size=SLOTS, max_size=SLOTS)),
    st.tuples(st.just("run"), st.tuples(st.integers(1, 3 * FINAL_AFTER_TOKENS), few, few)),
    st.tuples(st.just("send"), st.booleans()),
    st.tuples(st.just("bind"), st.tuples(slots, st.booleans())),
    st.tuples(st.just("leave"), slots),
    st.tuples(st.just("move"), st.tuples(slots, slots, few)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS), st.lists(actions, max_size=25))
def test_a_server_gets_the_last_token_of_every_position_once(kinds: list[bool], story: list[Any]) -> None:
    engine, number = Engine(SLOTS), 0
    for slot, every_token in enumerate(kinds):
        engine.bind(slot, Sampled(report(number, every_token, choice=number % 2)))
        number += 1
    for action, how in story:
        if action == "step":
            rows = [row for slot, (drafts, accepted) in enumerate(how) for row in engine.step(slot, drafts, accepted)]
            add(engine.slots, *rows[::-1], (0, -1, (5.0, 5.0, 5)))  # and a row in prefill, which has no position
        elif action == "run":
            for _ in range(how[0]):
                add(engine.slots, *(row for slot in range(SLOTS) for row in engine.step(slot, how[1], how[2])))
        elif action == "send":
            engine.deliver(settle=how)
        elif action == "bind":
            engine.bind(how[0], Sampled(report(number, how[1], choice=number % 2)))
            number += 1
        elif action == "leave":
            engine.bind(how, None)
        else:
            engine.move(*how)
    engine.deliver(settle=True)
    engine.deliver(settle=True)
    for request in engine.requests:
        sampled = [request.last[position] for position in range(request.length)]
        choice = engine.received.get((request.report.request, request.report.choice), ChoiceStats())
        choice.tokens = request.length
        assert choice.missing() == 0
        if request.report.every_token:
            known = [choice.records[position] for position in range(request.length)]
            assert repr(known) == repr(sampled)  # NaN is like itself here
        choice.settle()
        expected = np.zeros(1, dtype=TOTALS_DTYPE)
        add_tokens(expected, np.zeros(len(sampled), dtype=np.intp), np.array(sampled, dtype=VALUES_DTYPE))
        for name in SUMMED_FIELDS:
            assert choice.totals[name].tolist() == expected[name].tolist(), name


# How it gets to the host


def test_a_stage_takes_a_step_to_the_host() -> None:
    """On CUDA (benchmarks/gpu.sh) nothing up to `end` may wait for the device."""
    done = TransformOutput.of(
        torch.empty(0),
        torch.tensor([1.5, NAN]).to(DEVICE),
        torch.tensor([0.5, NAN]).to(DEVICE),
        torch.tensor([3, 0]).int().to(DEVICE),
    )
    slots, positions = torch.tensor([4, -1]).int().to(DEVICE), torch.tensor([7, 0]).int().to(DEVICE)
    stage = StepBuffer(3, DEVICE)
    with forbidden_to_wait():
        stage.begin()
        stage.end(slots, positions, done)
    columns, seconds = stage.wait()
    assert columns[[0, 1, 4]].tolist() == [[4, -1], [7, 0], [3, 0]]
    assert repr(columns[2:4].view(np.float32).tolist()) == "[[1.5, nan], [0.5, nan]]"
    assert seconds > 0


@contextlib.contextmanager
def forbidden_to_wait() -> Iterator[None]:
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


# What is sent


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with socket_dir() as path:
        monkeypatch.setenv(SOCKET_DIR_ENV, path)
        yield Path(path)


class Server:
    """An API server's end."""

    def __init__(self, place: Path | str, channel: str) -> None:
        self.channel = channel
        self.socket = listen(zmq.Context.instance(), place if isinstance(place, str) else f"ipc://{place}", channel)

    def receive(self) -> tuple[StructuredArray, StructuredArray, np.void]:
        assert self.socket.poll(10_000), "nothing came"
        channel, message = self.socket.recv_multipart()
        assert channel.decode() == self.channel
        return unpack(message)


@contextlib.contextmanager
def server(place: Path | str, channel: str = ONE) -> Iterator[Server]:
    opened = Server(place, channel)
    try:
        yield opened
    finally:
        opened.socket.close(linger=0)


def step(telemetry: StatsRecorder, *rows: tuple[int, int, Values]) -> StepBuffer:
    stage = telemetry.begin()
    assert stage is not None
    where, positions, values = zip(*rows, strict=True)
    before, after, steps = zip(*values, strict=True)
    done = TransformOutput.of(torch.empty(0), torch.tensor(before), torch.tensor(after), torch.tensor(steps).int())
    telemetry.end(stage, torch.tensor(where).int(), torch.tensor(positions).int(), done)
    return stage


def test_every_token_arrives_as_it_is_sampled(folder: Path) -> None:
    telemetry = StatsRecorder(3, 5, CPU)  # the last slot: no slot, -1, is not it
    with server(folder) as one:
        telemetry.bind(2, report(7, every_token=True, choice=1))
        step(telemetry, (-1, 5, at(1)), (2, 0, (1.5, 0.25, 3)), (0, 0, at(1)), (2, 1, (2.5, 0.5, 4)), (2, -1, at(1)))
        tokens, totals, worker = one.receive()
        assert read(tokens) == [(7, 1, 0, 1.5, 0.25, 3), (7, 1, 1, 2.5, 0.5, 4)]
        assert len(totals) == 0
        assert worker["seconds"] > 0
        assert worker["dropped"] == 0


def test_totals_arrive_when_a_request_falls_silent(folder: Path) -> None:
    telemetry = StatsRecorder(1, 1, CPU)
    with server(folder) as one:
        telemetry.bind(0, report(7, choice=1))
        for position in range(FINAL_AFTER_TOKENS + 2):
            step(telemetry, (0, position, at(position)))
        choice = ChoiceStats()
        choice.tokens = FINAL_AFTER_TOKENS + 2
        while choice.missing():
            tokens, totals, _ = one.receive()
            assert {*tokens["request"], *totals["request"]} == {7}
            assert {*tokens["choice"], *totals["choice"]} == {1}
            choice.records |= {position: tuple(values) for _, _, position, *values in tokens.tolist()}
            for row in totals:
                choice.add_totals(row)
        choice.settle()
        assert choice.totals["steps"][0] == sum(range(FINAL_AFTER_TOKENS + 2))


def test_each_server_gets_its_own(folder: Path) -> None:
    telemetry = StatsRecorder(4, 4, CPU)
    with server(folder, ONE) as one, server(folder, OTHER) as other:
        telemetry.bind(0, report(7, every_token=True, channel=ONE))
        telemetry.bind(1, report(7, every_token=True, channel=OTHER))
        telemetry.bind(2, report(8, channel=OTHER))
        telemetry.bind(3, report(9, channel=ONE))
        step(telemetry, *((slot, slot, at(slot)) for slot in range(4)))
        for end, every, total in ((one, (7, 0, 0), (9, 0, 3)), (other, (7, 0, 1), (8, 0, 2))):
            tokens, totals = [], []
            while len(tokens) < 2:  # the second when its request has fallen silent
                more, rows, _ = end.receive()
                tokens += read(more)
                totals += rows["request"].tolist()
            assert tokens == [(*every, *at(every[2])), (*total, *at(total[2]))]
            assert totals == []
            assert end.socket.poll(0) == 0


def test_the_seconds_are_told_once(folder: Path) -> None:
    telemetry = StatsRecorder(2, 2, CPU)
    with server(folder, ONE) as one, server(folder, OTHER) as other:
        telemetry.bind(0, report(7, every_token=True, channel=ONE))
        telemetry.bind(1, report(8, every_token=True, channel=OTHER))
        step(telemetry, (0, 0, at(0)), (1, 0, at(0)))
        seconds = sorted(end.receive()[2]["seconds"] for end in (one, other))
        assert seconds[0] == 0 < seconds[1]


def test_without_a_report_there_is_no_thread(folder: Path) -> None:
    telemetry = StatsRecorder(2, 2, CPU)
    telemetry.bind(0, None)
    assert telemetry.begin() is None
    assert telemetry.thread is None


@pytest.mark.parametrize("without", ["a folder", "its rank's turn"])
def test_nothing_is_reported_without(without: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if without == "a folder":
        monkeypatch.delenv(SOCKET_DIR_ENV)
    telemetry = StatsRecorder(2, 2, CPU, reports=without == "a folder")
    telemetry.bind(0, report(7, every_token=True))
    assert telemetry.begin() is None
    assert telemetry.thread is None
    assert not telemetry.stages


def test_nothing_is_reported_once_the_last_request_has_left(folder: Path) -> None:
    telemetry = StatsRecorder(2, 2, CPU)
    telemetry.bind(0, report(7))
    telemetry.bind(1, report(8))
    telemetry.bind(0, None)
    assert telemetry.begin() is not None
    telemetry.bind(1, None)
    assert telemetry.begin() is None


def test_records_for_an_unknown_server_are_counted(folder: Path) -> None:
    telemetry = StatsRecorder(2, 2, CPU)
    with server(folder) as one:
        telemetry.bind(0, report(7, every_token=True, channel=OTHER))
        telemetry.bind(1, report(8, every_token=True))
        step(telemetry, (0, 0, at(0)), (0, 1, at(1)), (0, 2, at(2)))
        step(telemetry, (1, 0, at(0)))
        tokens, _, worker = one.receive()
        assert read(tokens) == [(8, 0, 0, *at(0))]
        assert worker["dropped"] == 3
        step(telemetry, (1, 1, at(1)))
        assert one.receive()[2]["dropped"] == 0  # told once
        assert telemetry.thread is not None and telemetry.thread.is_alive()


def test_without_room_a_step_is_dropped_and_counted(folder: Path) -> None:
    telemetry = StatsRecorder(3, 3, CPU)
    with server(folder) as one:
        for slot in range(2):
            telemetry.bind(slot, report(slot, every_token=True))
        taken = [telemetry.begin() for _ in range(MAX_IN_FLIGHT_STEPS)]
        assert None not in taken
        assert telemetry.begin() is None
        assert telemetry.begin() is None
        telemetry.stages.append(StepBuffer(3, CPU))
        step(telemetry, (0, 0, at(0)))
        assert one.receive()[2]["dropped"] == 4


def test_a_stage_is_used_again_and_again(folder: Path) -> None:
    telemetry = StatsRecorder(1, 1, CPU)
    with server(folder) as one:
        telemetry.bind(0, report(7, every_token=True))
        for position in range(2 * MAX_IN_FLIGHT_STEPS):
            step(telemetry, (0, position, at(position)))
            tokens, _, worker = one.receive()
            assert read(tokens) == [(7, 0, position, *at(position))]
            assert worker["dropped"] == 0


def test_a_step_that_cannot_be_read_does_not_stop_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("the device is gone")

    telemetry = StatsRecorder(1, 1, CPU)
    with server(folder) as one:
        telemetry.bind(0, report(7, every_token=True))
        monkeypatch.setattr(telemetry.stages[0], "wait", fail)
        step(telemetry, (0, 0, at(0)))
        step(telemetry, (0, 1, at(1)))
        assert read(one.receive()[0]) == [(7, 0, 1, *at(1))]
        assert "the device is gone" in caplog.text
        assert len(telemetry.stages) == MAX_IN_FLIGHT_STEPS  # its room is free again


# Where


@pytest.mark.parametrize("inside", ["short", "a-long-name-of-a-folder-for-temporary-files-" * 2])
def test_the_folder_of_sockets_is_its_owner_s_alone(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / inside).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / inside))
    with socket_dir() as folder:
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        assert len(os.fsencode(f"{folder}/{ONE}")) <= 107  # what a unix socket's path may have
        with server(Path(folder)):
            assert os.listdir(folder) == [ONE]
    assert not os.path.exists(folder)


def test_the_folder_of_sockets_is_where_temporary_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as chosen:
        monkeypatch.setattr(tempfile, "tempdir", chosen)
        with socket_dir() as folder:
            assert os.path.dirname(folder) == chosen


def test_a_path_is_measured_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", suffix="é" * 30) as chosen:  # under fifty characters, over in bytes
        monkeypatch.setattr(tempfile, "tempdir", chosen)
        with socket_dir() as folder, server(Path(folder)):
            assert os.path.dirname(folder) == "/tmp"


# Between machines


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_api_servers_on_another_machine_have_a_port_each(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"{host}:{free_port(consecutive=2)}"
    monkeypatch.setenv(ADDRESS_ENV, address)
    monkeypatch.setenv(SOCKET_DIR_ENV, "/nowhere")  # em-serve makes one anyway
    with server(f"tcp://{address}", ONE) as one, server(f"tcp://{address}", OTHER) as other:
        telemetry = StatsRecorder(2, 2, CPU)
        telemetry.bind(0, report(7, every_token=True, channel=ONE))
        telemetry.bind(1, report(8, every_token=True, channel=OTHER))
        step(telemetry, (0, 3, at(3)), (1, 4, at(4)))
        assert read(one.receive()[0]) == [(7, 0, 3, *at(3))]
        assert read(other.receive()[0]) == [(8, 0, 4, *at(4))]


def test_an_address_that_is_another_s_stops_the_start() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for place in (f"tcp://127.0.0.1:{taken.getsockname()[1]}", "tcp://nowhere.invalid:8600"):
            with pytest.raises(RuntimeError, match=f"cannot listen for statistics on {re.escape(place)}: ."):
                Server(place, ONE)


@pytest.mark.parametrize(
    "text", ["", "8600", ":8600", "host", "host:", "host:0", "host:65536", "host:8x", "::1:8600", "[::1]"]
)
def test_what_is_no_address_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be HOST:PORT, with a port from 1 up to 65535"):
        parse_address(text)
