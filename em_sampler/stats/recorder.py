"""Statistics leaving the worker without making it wait: from the sampler to a thread, from there to an API server.

Knows slots and positions, not the engine. A request's API server is known by its channel (channels.py).
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import cast

import numpy as np
import torch
import zmq
from numpy.typing import NDArray
from torch import Tensor

from em_sampler.stats import transport
from em_sampler.stats.aggregator import PendingStats, ReturnAddress, SlotTable
from em_sampler.stats.wire import pack
from em_sampler.transforms.batch import TransformOutput

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT_STEPS = 256  # steps that may be under way to the thread; one more is dropped and counted
FLUSH_INTERVAL_S = (
    0.25  # seconds between totals, and without a token after which a request counts as over: no runner tells
)
# Seconds that the thread sleeps where nobody waits for a token's statistics: awake, it takes the interpreter
# from the sampler. Far less than STAGES steps take.
IDLE_SLEEP_S = 0.1
COLUMNS = 5  # slot, position, entropy before and after (as int32), steps


class StepBuffer:
    """One step's statistics on their way to the host. Nothing here waits for the device but `wait`, in the thread."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.columns: NDArray[np.int32]
        self.pinned: Tensor | None = None
        if device.type == "cuda":
            self.pinned = torch.empty(COLUMNS * max_rows, dtype=torch.int32, pin_memory=True)
            event = partial(torch.cuda.Event, enable_timing=True, blocking=True)
            self.events = event(), event()

    def begin(self) -> None:
        """Before the transform."""
        if self.pinned is not None:
            self.events[0].record()
        self.seconds = -time.perf_counter()

    def end(self, slots: Tensor, positions: Tensor, done: TransformOutput) -> None:
        """After it: take what it returned, for rows of the given slots and positions (int32 [rows], slot -1: none)."""
        if self.pinned is None:  # by numpy, whose operations take a third of the time of torch's
            self.columns = np.concatenate((slots.numpy()[None], positions.numpy()[None], done.statistics.numpy()))
        else:
            columns = torch.cat((slots[None], positions[None], done.statistics))
            room = self.pinned[: columns.numel()].view(columns.shape)
            self.columns = room.copy_(columns, non_blocking=True).numpy()
            self.events[1].record()
        self.seconds += time.perf_counter()

    def wait(self) -> tuple[NDArray[np.int32], float]:
        """([COLUMNS, rows], seconds the transform took)."""
        if self.pinned is None:
            return self.columns, self.seconds
        self.events[1].synchronize()
        return self.columns, self.events[0].elapsed_time(self.events[1]) / 1000


class StatsRecorder:
    """The sampler's side. Its calls come in the engine's order and never wait."""

    def __init__(self, slots: int, max_rows: int, device: torch.device, reports: bool = True) -> None:
        """`reports`: False for the tensor-parallel ranks whose samples repeat the first's."""
        self.place = transport.server_address() if reports else None
        self.bound: set[int] = set()
        self.stages = deque(StepBuffer(max_rows, device) for _ in range(MAX_IN_FLIGHT_STEPS if self.place else 0))
        self.dropped = 0  # records, since the start
        self.events: SimpleQueue[tuple[int, ReturnAddress | None] | StepBuffer] = SimpleQueue()
        self.size = slots
        self.thread: threading.Thread | None = None

    def bind(self, slot: int, report: ReturnAddress | None) -> None:
        """`slot` now holds a request with this report, or none of our business."""
        if self.place is None or (report is None and slot not in self.bound):
            return
        self.bound.add(slot) if report else self.bound.discard(slot)
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, args=(self.place,), name="em_inf_telemetry", daemon=True)
            self.thread.start()
        self.events.put((slot, report))

    def begin(self) -> StepBuffer | None:
        """Before a transform; None where nobody wants its statistics, or where there is no room for them."""
        if not self.bound:
            return None
        try:
            stage = self.stages.popleft()
        except IndexError:
            self.dropped += len(self.bound)
            return None
        stage.begin()
        return stage

    def end(self, stage: StepBuffer, slots: Tensor, positions: Tensor, done: TransformOutput) -> None:
        """After it (see `Stage.end`)."""
        stage.end(slots, positions, done)
        self.events.put(stage)

    def _work(self, place: str) -> None:
        slots, outbox = SlotTable(self.size), StatsSender(place)
        settled = time.monotonic()
        while True:
            waiting = any(account.waiting() for account in slots.accounts.values())
            come = self._come(max(0.0, settled + FLUSH_INTERVAL_S - time.monotonic()) if waiting else None)
            for is_stage, events in groupby(come, lambda event: isinstance(event, StepBuffer)):
                with _whatever_happens():
                    if is_stage:
                        self._read(cast(list[StepBuffer], list(events)), slots, outbox)
                    else:
                        for binding in events:
                            slots.bind(*cast(tuple[int, ReturnAddress | None], binding))
            with _whatever_happens():
                if time.monotonic() >= settled + FLUSH_INTERVAL_S:
                    settled = time.monotonic()
                    for account in slots.accounts.values():
                        account.settle()
                for channel, account in slots.accounts.items():
                    if account.tokens or account.totals:
                        outbox.send(channel, account, self.dropped)
            if not slots.waited_for():
                time.sleep(IDLE_SLEEP_S)

    def _come(self, timeout: float | None) -> Iterator[tuple[int, ReturnAddress | None] | StepBuffer]:
        """What there is, waiting for the first at most `timeout`."""
        with contextlib.suppress(Empty):
            yield self.events.get(timeout=timeout)
            while True:
                yield self.events.get_nowait()

    def _read(self, stages: list[StepBuffer], slots: SlotTable, outbox: "StatsSender") -> None:
        """Account for the rows of several steps at once: one by one they would take many times as long."""
        read = []
        for stage in stages:
            with _whatever_happens():
                columns, seconds = stage.wait()
                read.append(columns)
                outbox.seconds += seconds
        try:
            if read:
                slots.add(np.concatenate(read, axis=1))
        finally:
            self.stages.extend(stages)


@contextlib.contextmanager
def _whatever_happens() -> Iterator[None]:
    """A lost statistic is no reason to stop the others."""
    try:
        yield
    except Exception:
        logger.exception("em_inf: statistics of a step were lost")


class StatsSender:
    """Sends messages to API servers. What one cannot take is lost, and counted."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.context = zmq.Context()
        self.sockets: dict[str, zmq.Socket[bytes]] = {}
        self.seconds = 0.0  # spent in the transform, not yet reported
        self.lost = 0  # records, here
        self.reported = 0  # of those lost here and before

    def send(self, channel: str, account: PendingStats, dropped: int) -> None:
        """One message with all that is to be sent. `dropped`: records that were lost before they came here."""
        tokens, totals = account.tokens, account.totals
        account.tokens, account.totals = [], []
        try:
            message = pack(tokens, totals, self.seconds, dropped + self.lost - self.reported)
            if channel not in self.sockets:
                self.sockets[channel] = transport.connect(self.context, self.place, channel)
            self.sockets[channel].send_multipart((channel.encode(), message), zmq.NOBLOCK)
            self.seconds, self.reported = 0.0, dropped + self.lost
        except (zmq.ZMQError, FileNotFoundError):
            self.lost += sum(map(len, tokens)) + sum(map(len, totals))
