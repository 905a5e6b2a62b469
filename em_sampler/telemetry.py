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
from collections import deque
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
from em_sampler.records import TOKEN, TOTALS, Array, add_tokens, pack
from em_sampler.torch_batched import Transformed

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "EM_INF_TELEMETRY_DIR"  # the folder of the API servers' sockets, made by em-serve for its owner alone
MAX_TEMPORARY = 50  # bytes; a unix socket's path has at most 107, of which CHANNEL and the folder's name take 50
CHANNEL = re.compile("[0-9a-f]{32}")
STAGES = 64  # steps that may be under way to the thread; one more is dropped and counted
WINDOW = 32  # tokens after which one is settled: neither sampled again nor found to lie past the end of its reply
IDLE = 0.25  # seconds between totals, and without a token after which a request counts as over: no runner tells
COLUMNS = 5  # slot, position, entropy before and after (as int32), steps

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


class Account:
    """What one API server is to be told: some tokens as they come, of others only the totals."""

    def __init__(self) -> None:
        self.tokens: list[Array] = []  # to be sent
        self.totals: list[Array] = []  # to be sent
        self.log: list[Array] = []  # tokens to be totalled, in the order in which they were sampled
        self.tail = np.zeros(0, dtype=TOKEN)  # those of before that may still change

    def waiting(self) -> bool:
        """Whether there is anything to total."""
        return bool(self.log) or len(self.tail) > 0

    def settle(self) -> None:
        """Total what will not change; tokens at the end of a request that has had no new one are sent as they are."""
        tokens = np.concatenate([self.tail, *self.log])
        if not len(tokens):
            return
        order = np.lexsort((tokens["position"], tokens["choice"], tokens["request"]))  # stable: the last one is last
        new = order >= len(self.tail)
        self.log, tokens = [], tokens[order]
        request, choice, position = (tokens[name] for name in ("request", "choice", "position"))
        other_reply = (request[1:] != request[:-1]) | (choice[1:] != choice[:-1])
        last = np.append(other_reply | (position[1:] != position[:-1]), True)  # of the records of its token
        reply = np.append(0, np.cumsum(other_reply))[last]
        tokens, new = tokens[last], new[last]
        starts = np.flatnonzero(np.diff(reply, prepend=-1))
        ends = np.append(starts[1:], len(tokens)) - 1
        silent = ~np.logical_or.reduceat(new, starts)[reply]
        settled = tokens["position"] + WINDOW <= tokens["position"][ends][reply]
        self.totals.append(self._totals(tokens[starts], tokens[settled], reply[settled]))
        self.tokens.append(tokens[silent & ~settled])
        self.tail = tokens[~silent & ~settled]

    def _totals(self, replies: Array, tokens: Array, rows: Ints) -> Array:
        """TOTALS of `tokens`, token i into the row `rows[i]` of `replies`; only rows that have any."""
        totals = np.zeros(len(replies), dtype=TOTALS)
        totals["request"], totals["choice"] = replies["request"], replies["choice"]
        totals["first"] = np.iinfo(np.uint32).max
        np.minimum.at(totals["first"], rows, tokens["position"])
        np.maximum.at(totals["upto"], rows, tokens["position"] + 1)
        add_tokens(totals, rows, tokens)
        return totals[totals["tokens"] > 0]


class Slots:
    """Whose request is in each slot."""

    def __init__(self, count: int) -> None:
        self.accounts: dict[str, Account] = {}  # by channel
        self.shelves: list[tuple[Account, bool]] = []  # every account twice: for every token, for totals
        # One more, for rows without a slot: -1.
        self.shelf = np.full(count + 1, -1)
        self.request = np.zeros(count + 1, dtype=np.uint64)
        self.choice = np.zeros(count + 1, dtype=np.uint32)

    def bind(self, slot: int, report: Report | None) -> None:
        """A new request, or none, takes over `slot`."""
        if report is None:
            self.shelf[slot] = -1
            return
        if report.channel not in self.accounts:
            account = self.accounts[report.channel] = Account()
            self.shelves += [(account, False), (account, True)]
        account = self.accounts[report.channel]
        self.shelf[slot] = self.shelves.index((account, report.every_token))
        self.request[slot], self.choice[slot] = report.request, report.choice

    def add(self, rows: NDArray[np.int32]) -> None:
        """One step's rows [rows, COLUMNS] go to the accounts that they belong to."""
        slots, positions = rows[:, 0], rows[:, 1]
        tokens = np.empty(len(rows), dtype=TOKEN)
        tokens["request"], tokens["choice"], tokens["position"] = self.request[slots], self.choice[slots], positions
        tokens["before"], tokens["after"] = rows[:, 2].view(np.float32), rows[:, 3].view(np.float32)
        tokens["steps"] = rows[:, 4]
        shelf = np.where(positions < 0, -1, self.shelf[slots])
        for number in set(shelf.tolist()) - {-1}:
            account, every_token = self.shelves[number]
            (account.tokens if every_token else account.log).append(tokens[shelf == number])


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
        slots, outbox = Slots(self.size), Outbox(folder)
        settled = time.monotonic()
        while True:
            try:
                waiting = any(account.waiting() for account in slots.accounts.values())
                self._next(slots, outbox, max(0.0, settled + IDLE - time.monotonic()) if waiting else None)
                if time.monotonic() >= settled + IDLE:
                    settled = time.monotonic()
                    for account in slots.accounts.values():
                        account.settle()
                for channel, account in slots.accounts.items():
                    if account.tokens or account.totals:
                        outbox.send(channel, account, self.dropped)
            except Exception:  # a lost statistic is no reason to stop the others
                logger.exception("em_inf: statistics of a step were lost")

    def _next(self, slots: Slots, outbox: "Outbox", timeout: float | None) -> None:
        try:
            event = self.events.get(timeout=timeout)
        except Empty:
            return
        if isinstance(event, tuple):
            slots.bind(*event)
            return
        try:
            rows, seconds = event.wait()
            outbox.seconds += seconds
            slots.add(rows)
        finally:
            self.stages.append(event)


class Outbox:
    """Sends messages to API servers. What one cannot take is lost, and counted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = zmq.Context()
        self.sockets: dict[str, zmq.Socket[bytes]] = {}
        self.seconds = 0.0  # spent in the transform, not yet reported
        self.lost = 0  # records, here
        self.reported = 0  # of those lost here and before

    def send(self, channel: str, account: Account, dropped: int) -> None:
        """One message with all that is to be sent. `dropped`: records that were lost before they came here."""
        tokens, totals = account.tokens, account.totals
        account.tokens, account.totals = [], []
        try:
            message = pack(tokens, totals, self.seconds, dropped + self.lost - self.reported)
            self._socket(channel).send(message, zmq.NOBLOCK)
            self.seconds, self.reported = 0.0, dropped + self.lost
        except (zmq.ZMQError, FileNotFoundError):
            self.lost += sum(map(len, tokens)) + sum(map(len, totals))

    def _socket(self, channel: str) -> "zmq.Socket[bytes]":
        if channel not in self.sockets:
            path = self.folder / channel
            if not path.exists():
                raise FileNotFoundError(channel)
            self.sockets[channel] = self.context.socket(zmq.PUSH)
            self.sockets[channel].setsockopt(zmq.LINGER, 0)
            self.sockets[channel].connect(f"ipc://{path}")
        return self.sockets[channel]
