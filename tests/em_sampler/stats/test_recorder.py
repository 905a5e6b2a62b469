"""Stats on their way from the transform to an API server's socket: what arrives, what is lost and counted."""

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from em_sampler.stats import recorder as recorder_module
from em_sampler.stats.aggregator import FINAL_AFTER_TOKENS
from em_sampler.stats.candidates import Watch
from em_sampler.stats.curve import KEY_ENV
from em_sampler.stats.recorder import MAX_IN_FLIGHT_STEPS, StatsRecorder, StepBuffer
from em_sampler.stats.transport import ADDRESS_ENV, SOCKET_DIR_ENV, socket_dir
from em_sampler.stats.wire import MAX_ROWS
from em_sampler.transforms.batch import TransformOutput
from harness.ports import free_port
from server.stats.collector import ChoiceStats
from tests.em_sampler.stats.support import KEY, ONE, OTHER, TokenStats, at, read, return_address, server

CPU, NAN = torch.device("cpu"), math.nan
DEVICE = torch.device(os.environ.get("EM_TEST_DEVICE", "cpu"))  # benchmarks/gpu.sh sets it to "cuda"

# From the device to the host


def test_a_buffer_takes_a_step_to_the_host() -> None:
    """On CUDA (benchmarks/gpu.sh) neither `start` nor `finish` may wait for the device."""
    output = TransformOutput.of(
        torch.empty(0),
        torch.tensor([1.5, NAN]).to(DEVICE),
        torch.tensor([0.5, NAN]).to(DEVICE),
        torch.tensor([2.5, NAN]).to(DEVICE),
        torch.tensor([3, 0]).int().to(DEVICE),
    )
    slots, positions = torch.tensor([4, -1]).int().to(DEVICE), torch.tensor([7, 0]).int().to(DEVICE)
    buffer = StepBuffer(3, DEVICE)
    with forbidden_to_wait():
        buffer.start()
        buffer.finish(slots, positions, output)
    stats, seconds = buffer.wait()
    assert stats[[0, 1, 5]].tolist() == [[4, -1], [7, 0], [3, 0]]
    assert repr(stats[2:5].view("f4").tolist()) == "[[1.5, nan], [0.5, nan], [2.5, nan]]"
    assert seconds > 0


def test_a_buffer_takes_candidates_to_the_host() -> None:
    """Of the rows that are watched, as they are after the transform."""
    logits = torch.tensor([[9.0, 9.0, 9.0], [0.0, 1.0, 2.0], [9.0, 9.0, 9.0], [5.0, 4.0, 3.0]]).to(DEVICE)
    nothing = [torch.zeros(4).to(DEVICE)] * 3
    slots, positions = torch.tensor([4, 3, -1, 1]).int().to(DEVICE), torch.tensor([7, 0, 5, 2]).int().to(DEVICE)
    buffer = StepBuffer(4, DEVICE)
    with forbidden_to_wait():
        buffer.start()
        buffer.watch = Watch.of(logits, np.array([1, 3]))
        logits[1] = torch.tensor([0.0, 2.0, 1.0])
        buffer.finish(slots, positions, TransformOutput.of(logits, *nothing, torch.zeros(4).int().to(DEVICE)))
    buffer.wait()
    taken = buffer.take_candidates()
    assert taken is not None
    stats, (ids, before, after) = taken
    assert stats[:2].tolist() == [[3, 1], [0, 2]]
    assert ids.tolist() == [[1, 2, 0], [0, 1, 2]]
    p = np.exp([2, 1, 0]) / np.exp([2, 1, 0]).sum()
    assert before.view("f4") == pytest.approx(np.array([p[[1, 0, 2]], p]), rel=1e-6)
    assert after.view("f4") == pytest.approx(np.array([p, p]), rel=1e-6)
    assert buffer.take_candidates() is None


@contextlib.contextmanager
def forbidden_to_wait() -> Iterator[None]:
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


# From the host to the API servers


def test_the_thread_sets_its_device_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without it, waiting for an event would open a CUDA context on GPU 0."""

    class StoppedError(Exception):
        pass

    devices = []

    def stop(device: torch.device) -> None:
        devices.append(device)
        raise StoppedError

    monkeypatch.setattr(torch.cuda, "set_device", stop)
    recorder = StatsRecorder(1, 1, torch.device("cuda:1"), enabled=False)
    with pytest.raises(StoppedError):
        recorder._run(f"ipc://{tmp_path}", recorder.events, recorder.free_buffers)
    assert devices == [torch.device("cuda:1")]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with socket_dir() as path:
        monkeypatch.setenv(SOCKET_DIR_ENV, path)
        yield Path(path)


def step(recorder: StatsRecorder, *rows: tuple[int, int, TokenStats]) -> StepBuffer:
    """Record a step with these rows, each (slot, position, stats)."""
    buffer = recorder.start_step()
    assert buffer is not None
    slots, positions, stats = zip(*rows, strict=True)
    *floats, steps = zip(*stats, strict=True)
    output = TransformOutput.of(torch.empty(0), *map(torch.tensor, floats), torch.tensor(steps).int())
    recorder.finish_step(buffer, torch.tensor(slots).int(), torch.tensor(positions).int(), output)
    return buffer


def test_candidates_arrive_before_the_token_that_a_reply_waits_for(folder: Path) -> None:
    """And only where every token is asked for, if the device alone knew the rows."""
    recorder = StatsRecorder(3, 3, CPU)
    with server(folder) as one:
        recorder.assign(0, return_address(7, per_token=True, choice=1))
        recorder.assign(1, return_address(8))
        logits = torch.tensor([[0.0, 1.0], [2.0, 3.0], [1.0, 0.0]])
        buffer = recorder.start_step()
        assert buffer is not None
        buffer.watch = Watch.of(logits, np.arange(3))
        nothing = [torch.zeros(3)] * 3
        output = TransformOutput.of(logits, *nothing, torch.zeros(3).int())
        recorder.finish_step(buffer, torch.tensor([0, 1, 0]).int(), torch.tensor([4, 0, -1]).int(), output)
        first, second = one.message(), one.message()
        assert (len(first.candidates), len(first.tokens), len(second.tokens)) == (1, 0, 1)
        [row] = first.candidates
        assert (row["request_number"], row["choice"], row["position"]) == (7, 1, 4)
        assert row["id"][:2].tolist() == [1, 0]
        for name in ("before", "after"):
            assert row[name][:2] == pytest.approx([0.731059, 0.268941], rel=1e-5)
            assert np.isnan(row[name][2:]).all()


def test_every_token_arrives_as_it_is_sampled(folder: Path) -> None:
    recorder = StatsRecorder(3, 5, CPU)  # slot 2 is the last: -1, no slot, must not be taken for it
    with server(folder) as one:
        recorder.assign(2, return_address(7, per_token=True, choice=1))
        step(
            recorder,
            (-1, 5, at(1)),
            (2, 0, (1.5, 0.25, 2.5, 3)),
            (0, 0, at(1)),
            (2, 1, (2.5, 0.5, 1.5, 4)),
            (2, -1, at(1)),
        )
        tokens, totals, header = one.receive()
        assert read(tokens) == [(7, 1, 0, 1.5, 0.25, 2.5, 3), (7, 1, 1, 2.5, 0.5, 1.5, 4)]
        assert len(totals) == 0
        assert header["seconds"] > 0
        assert header["dropped"] == 0


def test_totals_arrive_when_a_request_is_idle(folder: Path) -> None:
    recorder = StatsRecorder(1, 1, CPU)
    with server(folder) as one:
        recorder.assign(0, return_address(7, choice=1))
        for position in range(FINAL_AFTER_TOKENS + 2):
            step(recorder, (0, position, at(position)))
        choice = ChoiceStats()
        choice.tokens = FINAL_AFTER_TOKENS + 2
        while choice.missing():
            tokens, totals, _ = one.receive()
            assert {*tokens["request_number"], *totals["request_number"]} == {7}
            assert {*tokens["choice"], *totals["choice"]} == {1}
            choice.by_position |= {position: tuple(stats) for _, _, position, *stats in tokens.tolist()}
            for row in totals:
                choice.add_totals(row)
        choice.finalize()
        assert choice.totals["steps"][0] == sum(range(FINAL_AFTER_TOKENS + 2))


def test_each_server_gets_its_requests_stats(folder: Path) -> None:
    recorder = StatsRecorder(4, 4, CPU)
    with server(folder, ONE) as one, server(folder, OTHER) as other:
        recorder.assign(0, return_address(7, per_token=True, socket_name=ONE))
        recorder.assign(1, return_address(7, per_token=True, socket_name=OTHER))
        recorder.assign(2, return_address(8, socket_name=OTHER))
        recorder.assign(3, return_address(9, socket_name=ONE))
        step(recorder, *((slot, slot, at(slot)) for slot in range(4)))
        for end, per_token, total in ((one, (7, 0, 0), (9, 0, 3)), (other, (7, 0, 1), (8, 0, 2))):
            tokens, totals = [], []
            while len(tokens) < 2:  # the second once its request is idle
                more, rows, _ = end.receive()
                tokens += read(more)
                totals += rows["request_number"].tolist()
            assert tokens == [(*per_token, *at(per_token[2])), (*total, *at(total[2]))]
            assert totals == []
            assert end.socket.poll(0) == 0


def test_the_seconds_are_reported_once(folder: Path) -> None:
    recorder = StatsRecorder(2, 2, CPU)
    with server(folder, ONE) as one, server(folder, OTHER) as other:
        recorder.assign(0, return_address(7, per_token=True, socket_name=ONE))
        recorder.assign(1, return_address(8, per_token=True, socket_name=OTHER))
        step(recorder, (0, 0, at(0)), (1, 0, at(0)))
        seconds = sorted(end.receive()[2]["seconds"] for end in (one, other))
        assert seconds[0] == 0 < seconds[1]


def test_without_a_return_address_there_is_no_thread(folder: Path) -> None:
    recorder = StatsRecorder(2, 2, CPU)
    recorder.assign(0, None)
    assert recorder.start_step() is None
    assert recorder.thread is None


@pytest.mark.parametrize("without", ["a folder", "being enabled"])
def test_nothing_is_recorded_without(without: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if without == "a folder":
        monkeypatch.delenv(SOCKET_DIR_ENV)
    recorder = StatsRecorder(2, 2, CPU, enabled=without == "a folder")
    recorder.assign(0, return_address(7, per_token=True))
    assert recorder.start_step() is None
    assert recorder.thread is None
    assert not recorder.free_buffers


def test_nothing_is_recorded_once_the_last_request_has_left(folder: Path) -> None:
    recorder = StatsRecorder(2, 2, CPU)
    recorder.assign(0, return_address(7))
    recorder.assign(1, return_address(8))
    recorder.assign(0, None)
    assert recorder.start_step() is not None
    recorder.assign(1, None)
    assert recorder.start_step() is None


def test_stats_for_an_unknown_server_are_counted_as_dropped(folder: Path) -> None:
    recorder = StatsRecorder(2, 2, CPU)
    with server(folder) as one:
        recorder.assign(0, return_address(7, per_token=True, socket_name=OTHER))
        recorder.assign(1, return_address(8, per_token=True))
        step(recorder, (0, 0, at(0)), (0, 1, at(1)), (0, 2, at(2)))
        step(recorder, (1, 0, at(0)))
        tokens, _, header = one.receive()
        assert read(tokens) == [(8, 0, 0, *at(0))]
        assert header["dropped"] == 3
        step(recorder, (1, 1, at(1)))
        assert one.receive()[2]["dropped"] == 0  # reported once
        assert recorder.thread is not None and recorder.thread.is_alive()


def test_without_a_free_buffer_a_step_is_dropped_and_counted(folder: Path) -> None:
    recorder = StatsRecorder(3, 3, CPU)
    with server(folder) as one:
        for slot in range(2):
            recorder.assign(slot, return_address(slot, per_token=True))
        taken = [recorder.start_step() for _ in range(MAX_IN_FLIGHT_STEPS)]
        assert None not in taken
        assert recorder.start_step() is None
        assert recorder.start_step() is None
        recorder.free_buffers.append(StepBuffer(3, CPU))
        step(recorder, (0, 0, at(0)))
        assert one.receive()[2]["dropped"] == 4


def test_buffers_are_used_again_and_again(folder: Path) -> None:
    recorder = StatsRecorder(1, 1, CPU)
    with server(folder) as one:
        recorder.assign(0, return_address(7, per_token=True))
        for position in range(2 * MAX_IN_FLIGHT_STEPS):
            step(recorder, (0, position, at(position)))
            tokens, _, header = one.receive()
            assert read(tokens) == [(7, 0, position, *at(position))]
            assert header["dropped"] == 0


def test_a_step_that_cannot_be_read_does_not_stop_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("the device is gone")

    recorder = StatsRecorder(1, 1, CPU)
    with server(folder) as one:
        recorder.assign(0, return_address(7, per_token=True))
        monkeypatch.setattr(recorder.free_buffers[0], "wait", fail)
        step(recorder, (0, 0, at(0)))
        step(recorder, (0, 1, at(1)))
        assert read(one.receive()[0]) == [(7, 0, 1, *at(1))]
        assert "the device is gone" in caplog.text
        assert len(recorder.free_buffers) == MAX_IN_FLIGHT_STEPS  # the failed step's buffer is free again


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_api_servers_on_another_machine_have_a_port_each(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"{host}:{free_port(consecutive=2)}"
    monkeypatch.setenv(ADDRESS_ENV, address)
    monkeypatch.setenv(KEY_ENV, KEY)
    monkeypatch.setenv(SOCKET_DIR_ENV, "/nowhere")  # em-serve makes a folder in any case
    with server(f"tcp://{address}", ONE) as one, server(f"tcp://{address}", OTHER) as other:
        recorder = StatsRecorder(2, 2, CPU)
        recorder.assign(0, return_address(7, per_token=True, socket_name=ONE))
        recorder.assign(1, return_address(8, per_token=True, socket_name=OTHER))
        step(recorder, (0, 3, at(3)), (1, 4, at(4)))
        assert read(one.receive()[0]) == [(7, 0, 3, *at(3))]
        assert read(other.receive()[0]) == [(8, 0, 4, *at(4))]


# A thread that dies


@pytest.mark.parametrize("fault", [MemoryError, SystemExit])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_started_again(
    fault: type[BaseException], folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def die(*_: object) -> None:
        raise fault

    monkeypatch.setattr(recorder_module, "RESTART_INTERVAL_S", 0.0)
    recorder = StatsRecorder(2, 2, CPU)
    with server(folder) as one:
        recorder.assign(0, return_address(7, per_token=True))
        with monkeypatch.context() as patched:
            patched.setattr(recorder_module, "_drain", die)
            recorder.start_step()  # starts the thread, which may be dead already
            died = join(recorder)
        step(recorder, (0, 1, at(1)))  # the request is as old as the dead thread
        assert read(one.receive()[0]) == [(7, 0, 1, *at(1))]
        recorder.assign(0, None)
        recorder.assign(1, return_address(8, per_token=True))
        step(recorder, (1, 0, at(0)))
        assert read(one.receive()[0]) == [(8, 0, 0, *at(0))]
        assert recorder.thread is not died
        assert "is started again" in caplog.text
        assert len(recorder.free_buffers) == MAX_IN_FLIGHT_STEPS


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_without_a_thread_nothing_piles_up_and_what_is_lost_is_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(recorder_module, "RESTART_INTERVAL_S", 1e9)
    monkeypatch.setattr(recorder_module, "_drain", die)
    recorder = StatsRecorder(2, 2, CPU)
    recorder.assign(0, return_address(0))
    recorder.start_step()
    join(recorder)
    before = recorder.dropped  # the step above, if the thread died as fast
    for number in range(1000):
        recorder.assign(0, return_address(number))
        assert recorder.start_step() is None
        recorder.assign(0, None)
    assert recorder.events.qsize() <= 2
    assert recorder.dropped - before == 1000


def test_a_thread_that_is_stuck_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(recorder_module, "RESTART_INTERVAL_S", 0.0)
    monkeypatch.setattr(recorder_module, "MAX_EVENTS", 100)
    recorder = StatsRecorder(1, 1, CPU)
    with server(folder) as one:
        recorder.assign(0, return_address(7, per_token=True))
        monkeypatch.setattr(recorder.free_buffers[0], "wait", release.wait)
        step(recorder, (0, 0, at(0)))
        stuck = recorder.thread
        assert stuck is not None
        while not recorder.events.empty():  # until it waits for that step
            time.sleep(0.001)
        for _ in range(1000):
            recorder.assign(0, return_address(8, per_token=True))
        assert recorder.events.qsize() <= 100
        step(recorder, (0, 1, at(1)))
        assert read(one.receive()[0]) == [(8, 0, 1, *at(1))]
        release.set()
        stuck.join(60)
        assert not stuck.is_alive()


def join(recorder: StatsRecorder) -> threading.Thread:
    """Wait for the end of the recorder's thread."""
    assert recorder.thread is not None
    recorder.thread.join(60)
    assert not recorder.thread.is_alive()
    return recorder.thread


def test_more_rows_than_a_message_holds_make_several(folder: Path) -> None:
    rows = MAX_ROWS + 10
    recorder = StatsRecorder(1, rows, CPU)
    with server(folder) as one:
        recorder.assign(0, return_address(7, per_token=True))
        step(recorder, *((0, position, (1.0, 0.5, 0.25, 3)) for position in range(rows)))
        messages = [one.receive() for _ in range(2)]
        assert [len(tokens) for tokens, _, _ in messages] == [MAX_ROWS, 10]
        assert np.concatenate([tokens for tokens, _, _ in messages])["position"].tolist() == list(range(rows))
        assert [header["seconds"] > 0 for _, _, header in messages] == [True, False]
