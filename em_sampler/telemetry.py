"""Statistics leaving the worker without making it wait: from the sampler to a thread, from there to an API server.

Knows slots and positions, not the engine. A request's API server is known by the name of its socket (`Report.channel`).
"""

import contextlib
import logging
import os
import re
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
import zmq
from numpy.typing import NDArray
from torch import Tensor

from em_sampler.params import REPORT_KEY
from em_sampler.records import TOKEN, TOTALS, VALUES, Array, add_tokens
from em_sampler.torch_batched import Transformed

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "EM_INF_TELEMETRY_DIR"  # the folder of the API servers' sockets, made by em-serve for its owner alone
MAX_TEMPORARY = 50  # bytes; a unix socket's path has at most 107, of which CHANNEL and the folder's name take 50
CHANNEL = re.compile("[0-9a-f]{32}")
STAGES = 64  # steps that may be under way to the thread; one more is dropped and counted
WINDOW = 32  # tokens after which one is settled: neither sampled again nor found to lie past the end of its reply
IDLE = 0.1  # seconds without a token after which a request's totals are sent: no runner tells of its end in time
COLUMNS = 5  # slot, position, and the three of VALUES
WORKER = np.dtype([("seconds", "f8"), ("dropped", "u8")])  # in the transform; records lost: since the last message

Ints = NDArray[np.int64]


@contextlib.contextmanager
def sockets_folder() -> Iterator[str]:
    """A new folder for the API servers' sockets, open to its owner alone."""
    temporary = tempfile.gettempdir()
    short_enough = len(os.fsencode(temporary)) < MAX_TEMPORARY
    with tempfile.TemporaryDirectory(prefix="em-inf-", dir=temporary if short_enough else "/tmp") as folder:
        yield folder


class Report(NamedTuple):
    """Where a request's statistics go."""

    channel: str  # the API server
    request: int  # by the API server's count
    choice: int  # of the request's `n`
    every_token: bool  # or totals alone, for the metrics

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> "Report | None":
        """What the API server left in `extra_args`; None where it asked for nothing."""
        match (extra_args or {}).get(REPORT_KEY):
            case [str(channel), int(request), int(choice), bool(every_token)] if (
                CHANNEL.fullmatch(channel) and 0 <= request < 2**63 and 0 <= choice < 2**31
            ):
                return cls(channel, request, choice, every_token)
        return None


class Stage:
    """One step's statistics on their way to the host. Nothing here waits for the device but `wait`, in the thread."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.pinned: Tensor | None = None
        if device.type == "cuda":
            self.pinned = torch.empty((max_rows, COLUMNS), dtype=torch.int32, pin_memory=True)
            event = partial(torch.cuda.Event, enable_timing=True, blocking=True)
            self.events = event(), event()

    def begin(self) -> None:
        """Before the transform."""
        if self.pinned is not None:
            self.events[0].record()
        self.seconds = -time.perf_counter()

    def end(self, slots: Tensor, positions: Tensor, done: Transformed) -> None:
        """After it: take what it returned, for rows of the given slots and positions (int32 [rows], slot -1: none)."""
        columns = (done.entropy_before.view(torch.int32), done.entropy_after.view(torch.int32), done.steps)
        self.rows = torch.stack((slots, positions, *columns), dim=1)
        if self.pinned is not None:
            self.rows = self.pinned[: len(slots)].copy_(self.rows, non_blocking=True)
            self.events[1].record()
        self.seconds += time.perf_counter()

    def wait(self) -> tuple[NDArray[np.int32], float]:
        """([rows, COLUMNS], seconds the transform took)."""
        if self.pinned is None:
            return self.rows.cpu().numpy(), self.seconds
        self.events[1].synchronize()
        return self.rows.numpy(), self.events[0].elapsed_time(self.events[1]) / 1000


class Ledger:
    """What each slot's request has sampled and not yet sent."""

    def __init__(self, slots: int) -> None:
        self.reports: list[Report | None] = [None] * slots
        self.every_token = np.zeros(slots, dtype=bool)
        self.totalled = np.zeros(slots, dtype=bool)
        self.changed = np.full(slots, np.inf)  # when a slot with something to send last got a token
        self.totals = np.zeros(slots, dtype=TOTALS)
        self.recent = np.zeros((slots, WINDOW), dtype=VALUES)  # the token at position p is in column p % WINDOW
        self.positions = np.full((slots, WINDOW), -1, dtype=np.int64)

    def bind(self, slot: int, report: Report | None) -> None:
        """A new request, or none, takes over `slot`."""
        self.reports[slot] = report
        self.every_token[slot] = report is not None and report.every_token
        self.totalled[slot] = report is not None and not report.every_token
        self.positions[slot] = -1
        self._reset(np.array([slot]))

    def add(self, slots: Ints, positions: Ints, values: Array) -> tuple[Ints, Array]:
        """Take tokens in; returns those to be sent one by one, with their slots."""
        now = self.every_token[slots] & (positions >= 0)
        later = self.totalled[slots] & (positions >= 0)
        if later.any():
            self._keep(slots[later], positions[later], values[later])
        return slots[now], self._tokens(slots[now], positions[now], values[now])

    def _keep(self, slots: Ints, positions: Ints, values: Array) -> None:
        column = positions % WINDOW
        held = self.positions[slots, column]
        settled = (held >= 0) & (held < positions)
        rows = slots[settled]
        add_tokens(self.totals, rows, self.recent[rows, column[settled]])
        np.minimum.at(self.totals["first"], rows, held[settled])
        np.maximum.at(self.totals["upto"], rows, held[settled] + 1)
        last = held <= positions  # a resumed request may sample again what is settled
        self.recent[slots[last], column[last]] = values[last]
        self.positions[slots[last], column[last]] = positions[last]
        self.changed[slots] = time.monotonic()

    def take(self, slots: Ints) -> tuple[Array, Ints, Array]:
        """What `slots` have to send: totals [len(slots)], and the tokens that are not settled, with their slots."""
        totals = self.totals[slots]
        row, column = np.nonzero(self.positions[slots] >= 0)
        held = slots[row]
        self._reset(slots)
        return totals, held, self._tokens(held, self.positions[held, column], self.recent[held, column])

    def waiting(self) -> bool:
        """Whether any slot has something to send."""
        return bool(np.isfinite(self.changed).any())

    def idle(self, since: float) -> Ints:
        """Slots with something to send that have had no token since then, the longest silent first.

        A request that was preempted may have left a slot and gone on in another: what is newer has to come last.
        """
        slots = np.flatnonzero(self.changed < since)
        return slots[np.argsort(self.changed[slots], kind="stable")]

    def _reset(self, slots: Ints) -> None:
        self.totals[slots] = np.zeros(1, dtype=TOTALS)
        for slot in slots:
            if (report := self.reports[slot]) is not None:
                self.totals[slot]["request"], self.totals[slot]["choice"] = report.request, report.choice
        self.totals["first"][slots] = np.iinfo(np.uint32).max
        self.changed[slots] = np.inf

    def _tokens(self, slots: Ints, positions: Ints, values: Array) -> Array:
        tokens = np.zeros(len(slots), dtype=TOKEN)
        tokens["request"], tokens["choice"] = self.totals["request"][slots], self.totals["choice"][slots]
        tokens["position"] = positions
        for name in VALUES.names or ():
            tokens[name] = values[name]
        return tokens


class Telemetry:
    """The sampler's side. Its calls come in the engine's order and never wait."""

    def __init__(self, slots: int, max_rows: int, device: torch.device, reports: bool = True) -> None:
        """`reports`: False for the tensor-parallel ranks whose samples repeat the first's."""
        folder = os.environ.get(FOLDER_VARIABLE)
        self.folder = Path(folder) if folder and reports else None
        self.bound: set[int] = set()
        self.stages = deque(Stage(max_rows, device) for _ in range(STAGES if self.folder else 0))
        self.dropped = 0  # records, since the start
        self.events: SimpleQueue[tuple[int, Report | None] | Stage] = SimpleQueue()
        self.size = slots
        self.thread: threading.Thread | None = None

    def bind(self, slot: int, report: Report | None) -> None:
        """`slot` now holds a request with this report, or none of our business."""
        if self.folder is None or (report is None and slot not in self.bound):
            return
        self.bound.add(slot) if report else self.bound.discard(slot)
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, args=(self.folder,), name="em_inf_telemetry", daemon=True)
            self.thread.start()
        self.events.put((slot, report))

    def begin(self) -> Stage | None:
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

    def end(self, stage: Stage, slots: Tensor, positions: Tensor, done: Transformed) -> None:
        """After it (see `Stage.end`)."""
        stage.end(slots, positions, done)
        self.events.put(stage)

    def _work(self, folder: Path) -> None:
        ledger, outbox = Ledger(self.size), Outbox(folder)
        while True:
            try:
                # Wakes of itself only where something waits for its request to fall silent.
                self._next(ledger, outbox, timeout=IDLE if ledger.waiting() else None)
            except Exception:  # a lost statistic is no reason to stop the others
                logger.exception("em_inf: statistics of a step were lost")

    def _next(self, ledger: Ledger, outbox: "Outbox", timeout: float | None) -> None:
        try:
            event = self.events.get(timeout=timeout)
        except Empty:
            event = None
        if isinstance(event, Stage):
            try:
                outbox.add(ledger, *event.wait())
            finally:
                self.stages.append(event)
        elif event is not None:
            slot, report = event
            outbox.settle(ledger, np.array([slot]))
            ledger.bind(slot, report)
        outbox.settle(ledger, ledger.idle(time.monotonic() - IDLE))
        outbox.send(self.dropped)


class Outbox:
    """Messages to API servers, of three parts each: tokens (TOKEN), totals (TOTALS), the worker's own (WORKER)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = zmq.Context()
        self.sockets: dict[str, zmq.Socket[bytes]] = {}
        self.tokens: dict[str, list[Array]] = defaultdict(list)
        self.totals: dict[str, list[Array]] = defaultdict(list)
        self.seconds = 0.0  # not yet reported
        self.lost = 0  # records, here
        self.reported = 0  # of those lost here and before

    def add(self, ledger: Ledger, rows: NDArray[np.int32], seconds: float) -> None:
        """Take in one step's rows [rows, COLUMNS]."""
        self.seconds += seconds
        rows = np.ascontiguousarray(rows[rows[:, 0] >= 0])
        slots, positions = rows[:, :2].astype(np.int64).T
        values = np.ascontiguousarray(rows[:, 2:]).view(VALUES).squeeze(1)
        self._file(ledger, self.tokens, *ledger.add(slots, positions, values))

    def settle(self, ledger: Ledger, slots: Ints) -> None:
        """Send what `slots` have kept."""
        slots = slots[np.isfinite(ledger.changed[slots])]
        if len(slots):
            totals, held, tokens = ledger.take(slots)
            self._file(ledger, self.totals, slots, totals)
            self._file(ledger, self.tokens, held, tokens)

    def _file(self, ledger: Ledger, shelf: dict[str, list[Array]], slots: Ints, records: Array) -> None:
        channels = np.array([report.channel if (report := ledger.reports[slot]) else "" for slot in slots])
        for channel in set(channels.tolist()):
            shelf[channel].append(records[channels == channel])

    def send(self, dropped: int) -> None:
        """One message to each API server that is owed any; what a server cannot take is lost, and counted.

        `dropped`: records that were lost before they came here.
        """
        for channel in {*self.tokens, *self.totals}:
            tokens = np.concatenate([np.zeros(0, TOKEN), *self.tokens.pop(channel, [])])
            totals = np.concatenate([np.zeros(0, TOTALS), *self.totals.pop(channel, [])])
            worker = np.array([(self.seconds, dropped + self.lost - self.reported)], dtype=WORKER)
            try:
                parts = [tokens.tobytes(), totals.tobytes(), worker.tobytes()]
                self._socket(channel).send_multipart(parts, zmq.NOBLOCK)
                self.seconds, self.reported = 0.0, dropped + self.lost
            except (zmq.ZMQError, FileNotFoundError):
                self.lost += len(tokens) + len(totals)

    def _socket(self, channel: str) -> "zmq.Socket[bytes]":
        if channel not in self.sockets:
            path = self.folder / channel
            if not path.exists():
                raise FileNotFoundError(channel)
            self.sockets[channel] = self.context.socket(zmq.PUSH)
            self.sockets[channel].setsockopt(zmq.LINGER, 0)
            self.sockets[channel].connect(f"ipc://{path}")
        return self.sockets[channel]
