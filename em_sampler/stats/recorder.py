"""Brings stats out of a worker without making it wait: from the sampler to a thread, from there to the API servers.

Knows slots and positions, not vLLM. What is sent, and when, is decided in aggregator.py.
"""

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
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
from em_sampler.stats.candidates import Watch
from em_sampler.stats.wire import MAX_ROWS, StructuredArray, pack
from em_sampler.transforms.batch import STATS, TransformOutput

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT_STEPS = 256  # steps on their way to the thread; the stats of one more are dropped and counted
# Totals are sent this often, and a request that got no token for this long counts as finished: neither of vLLM's
# runners reports the end.
FLUSH_INTERVAL_S = 0.25
# The thread sleeps if no response needs the stats of single tokens: awake, it competes with the sampler for the GIL.
# Far less than MAX_IN_FLIGHT_STEPS steps take.
IDLE_SLEEP_S = 0.1
MAX_EVENTS = 2**16  # that wait for the thread: far more than it leaves in IDLE_SLEEP_S. One more, and it is replaced
RESTART_INTERVAL_S = 1.0  # at least so long between two starts of the thread
STEP_FIELDS = 2 + STATS  # slot, position, and what the transform measured

Assignment = tuple[int, ReturnAddress | None]  # of a slot


class StepBuffer:
    """One step's stats on their way to the host. Only `wait`, which the thread calls, waits for the device."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.stats: NDArray[np.int32]  # [STEP_FIELDS, rows]
        self.pinned: Tensor | None = None
        if device.type == "cuda":
            self.pinned = torch.empty(STEP_FIELDS * max_rows, dtype=torch.int32, pin_memory=True)
            event = partial(torch.cuda.Event, enable_timing=True, blocking=True)
            self.events = event(), event(), event()  # the transform's start and end, and everything is on the host

    def start(self) -> None:
        """Start the clock, before the transform."""
        self.watch: Watch | None = None  # of the rows whose candidates are wanted, for the caller to set
        if self.pinned is not None:
            self.events[0].record()
        self.seconds = -time.perf_counter()

    def finish(self, slots: Tensor, positions: Tensor, output: TransformOutput) -> None:
        """Stop the clock and copy the transform's stats to the host, then the candidates.

        Args:
            slots: int32 [rows], the slot of each row's request; -1 without one.
            positions: int32 [rows], the position of each row's token in its choice; -1 for a row still in prefill.
            output: what the transform returned.
        """
        if self.pinned is None:  # NumPy's operations take a third of the time of torch's
            self.stats = np.concatenate((slots.numpy()[None], positions.numpy()[None], output.stats.numpy()))
        else:
            stats = torch.cat((slots[None], positions[None], output.stats))
            pinned = self.pinned[: stats.numel()].view(stats.shape)
            self.stats = pinned.copy_(stats, non_blocking=True).numpy()
            self.events[1].record()
        self.seconds += time.perf_counter()
        if self.watch:
            found = self.watch.candidates(output.logits)
            self.candidates = found.to("cpu", non_blocking=True).numpy()
        if self.pinned is not None:
            self.events[2].record()

    def wait(self) -> tuple[NDArray[np.int32], float]:
        """Return (stats [STEP_FIELDS, rows], seconds the transform took) once all of it is on the host."""
        if self.pinned is None:
            return self.stats, self.seconds
        self.events[2].synchronize()
        return self.stats, self.events[0].elapsed_time(self.events[1]) / 1000

    def take_candidates(self) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
        """Return (stats [STEP_FIELDS, rows], candidates [3, rows, k]) of the watched rows, after `wait`."""
        watch, self.watch = self.watch, None  # its memory is free then
        return (self.stats[:, watch.rows], self.candidates) if watch else None


class StatsRecorder:
    """The sampler's side. Its methods are called in the engine's order and never wait."""

    def __init__(self, slots: int, max_rows: int, device: torch.device, enabled: bool = True) -> None:
        """Prepare; the thread starts with the first request that wants stats.

        Args:
            slots: requests at a time.
            max_rows: rows of a step.
            device: of the transform's output.
            enabled: False for a tensor-parallel rank that samples the same tokens as the first.
        """
        self.server_address = transport.server_address() if enabled else None
        self.slots, self.max_rows, self.device = slots, max_rows, device
        self.assigned: dict[int, ReturnAddress] = {}  # of the slots whose request wants stats
        self.dropped = 0  # tokens whose stats had no buffer, since the start
        self.thread: threading.Thread | None = None
        self.started_at = -math.inf
        self._new_queue()

    def assign(self, slot: int, return_address: ReturnAddress | None) -> None:
        """Assign `slot` to a request, or clear it (None)."""
        if self.server_address is None or (return_address is None and slot not in self.assigned):
            return
        if return_address:
            self.assigned[slot] = return_address
        else:
            del self.assigned[slot]
        if self._thread_takes_events():  # a new thread gets all of `assigned`
            self.events.put((slot, return_address))

    def start_step(self) -> StepBuffer | None:
        """Return a buffer for the next step, its clock started; None if nobody wants its stats or no buffer is free."""
        if not self.assigned:
            return None
        if not self._thread_takes_events():
            self._start_thread()
        if not self._thread_takes_events() or not self.free_buffers:
            self.dropped += len(self.assigned)
            return None
        buffer = self.free_buffers.popleft()
        buffer.start()
        return buffer

    def _thread_takes_events(self) -> bool:
        return self.thread is not None and self.thread.is_alive() and self.events.qsize() < MAX_EVENTS

    def _start_thread(self) -> None:
        """Start the thread, or another in the place of one that has died or is stuck: what it still had is lost."""
        if time.monotonic() < self.started_at + RESTART_INTERVAL_S:
            return
        if self.thread is not None:
            logger.error("em_inf: the thread that sends statistics is started again; some are lost")
            self._new_queue()
        self.started_at = time.monotonic()
        for assignment in self.assigned.items():
            self.events.put(assignment)
        arguments = (self.server_address, self.events, self.free_buffers)
        self.thread = threading.Thread(target=self._run, args=arguments, name="em_inf_stats", daemon=True)
        self.thread.start()

    def _new_queue(self) -> None:
        """Make the thread's queue and buffers anew: nobody knows which of them a dead thread still had."""
        self.events: SimpleQueue[Assignment | StepBuffer] = SimpleQueue()
        buffers = MAX_IN_FLIGHT_STEPS if self.server_address else 0
        self.free_buffers = deque(StepBuffer(self.max_rows, self.device) for _ in range(buffers))

    def finish_step(self, buffer: StepBuffer, slots: Tensor, positions: Tensor, output: TransformOutput) -> None:
        """Hand the transform's output to the thread; arguments as for `StepBuffer.finish`."""
        buffer.finish(slots, positions, output)
        self.events.put(buffer)

    def _run(
        self, server_address: str, queue: SimpleQueue[Assignment | StepBuffer], free_buffers: deque[StepBuffer]
    ) -> None:
        """Do the thread's work until it is replaced: add steps to the slots' pending stats, fold them, send them."""
        if self.device.type == "cuda":  # else, waiting for an event would open a CUDA context on GPU 0 as well
            torch.cuda.set_device(self.device)
        slots, sender = SlotTable(self.slots), StatsSender(server_address)
        last_fold = time.monotonic()
        while self.events is queue:
            until_fold = max(0.0, last_fold + FLUSH_INTERVAL_S - time.monotonic())
            events = _drain(queue, until_fold if slots.has_pending() else None)
            for is_step, group in groupby(events, lambda event: isinstance(event, StepBuffer)):
                with _log_and_continue():
                    if is_step:
                        self._read(cast(list[StepBuffer], list(group)), free_buffers, slots, sender)
                    else:
                        for assignment in group:
                            slots.assign(*cast(Assignment, assignment))
            with _log_and_continue():
                if time.monotonic() >= last_fold + FLUSH_INTERVAL_S:
                    last_fold = time.monotonic()
                    slots.fold()
                for socket_name, pending in slots.pending.items():
                    if pending.tokens or pending.totals or pending.candidates:
                        sender.send(socket_name, pending, self.dropped)
            if not slots.any_per_token():
                time.sleep(IDLE_SLEEP_S)

    def _read(
        self, buffers: list[StepBuffer], free_buffers: deque[StepBuffer], slots: SlotTable, sender: "StatsSender"
    ) -> None:
        """Add the stats of several steps at once: one by one they would take many times as long."""
        steps = []
        for buffer in buffers:
            with _log_and_continue():
                stats, seconds = buffer.wait()
                steps.append(stats)
                sender.seconds += seconds
                if found := buffer.take_candidates():
                    (slot_of_row, positions, *_), candidates = found
                    slots.add_candidates(slot_of_row, positions, candidates)
        try:
            if steps:
                slots.add(np.concatenate(steps, axis=1))
        finally:
            free_buffers.extend(buffers)


def _drain(queue: SimpleQueue[Assignment | StepBuffer], timeout: float | None) -> Iterator[Assignment | StepBuffer]:
    """Yield what is in the queue, waiting up to `timeout` seconds for the first (None: as long as it takes)."""
    with contextlib.suppress(Empty):
        yield queue.get(timeout=timeout)
        while True:
            yield queue.get_nowait()


@contextlib.contextmanager
def _log_and_continue() -> Iterator[None]:
    """Log an exception instead of raising it: the stats of one step are lost, those of the next must not be."""
    try:
        yield
    except Exception:
        logger.exception("em_inf: statistics of a step were lost")


class StatsSender:
    """Sends messages to API servers. What a server cannot take is lost and counted: nothing waits for it."""

    def __init__(self, server_address: str) -> None:
        """`server_address`: see `transport.server_address`."""
        self.server_address = server_address
        self.context = zmq.Context()
        self.sockets: dict[str, zmq.Socket[bytes]] = {}  # by socket name
        self.seconds = 0.0  # spent in the transform, not reported yet
        self.lost = 0  # rows that could not be sent, since the start
        self.reported = 0  # of the rows lost here and before

    def send(self, socket_name: str, pending: PendingStats, dropped: int) -> None:
        """Send all that `pending` has to be sent, in messages of at most MAX_ROWS rows.

        `dropped`: rows lost before they came here, since the start.
        """
        tokens, totals, candidates = pending.take()
        for rows in _chunks(totals):  # first: they replace no token that is sent with them
            self._send(socket_name, dropped, totals=[rows])
        for rows in _chunks(candidates):  # before the tokens: a reply waits for those alone
            self._send(socket_name, dropped, candidates=[rows])
        for rows in _chunks(tokens):
            self._send(socket_name, dropped, tokens=[rows])

    def _send(
        self,
        socket_name: str,
        dropped: int,
        tokens: Sequence[StructuredArray] = (),
        totals: Sequence[StructuredArray] = (),
        candidates: Sequence[StructuredArray] = (),
    ) -> None:
        lost = self.lost
        self.lost += sum(map(len, (*tokens, *totals)))  # until they are sent; a reply shows which candidates it lacks
        with contextlib.suppress(zmq.ZMQError, FileNotFoundError):
            lost_since = dropped + lost - self.reported
            message = pack(socket_name, tokens, totals, self.seconds, lost_since, candidates)
            if socket_name not in self.sockets:
                self.sockets[socket_name] = transport.connect(self.context, self.server_address, socket_name)
            self.sockets[socket_name].send(message, zmq.NOBLOCK)
            self.lost, self.seconds, self.reported = lost, 0.0, dropped + lost


def _chunks(parts: list[StructuredArray]) -> Iterator[StructuredArray]:
    if not parts:
        return
    rows = np.concatenate(parts)
    for start in range(0, len(rows), MAX_ROWS):
        yield rows[start : start + MAX_ROWS]
