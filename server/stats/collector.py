"""Statistics of the requests in flight: the workers' records in, summaries out. Knows no HTTP and no vLLM.

A request whose records are late is reported as it stands after GRACE seconds; it is never held up longer.
"""

import asyncio
import contextlib
import itertools
import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import zmq

from em_sampler.params import RETURN_ADDRESS_KEY, Params
from em_sampler.stats import transport
from em_sampler.stats.wire import TOTALS_DTYPE, VALUES_DTYPE, add_tokens, add_totals, unpack
from server.stats.metrics import Metrics

RESPONSE_TIMEOUT_S = 0.5  # seconds that a reply waits for the last of its statistics
METRICS_TIMEOUT_S = 5.0  # the same where no reply waits, only the metrics
POLL_INTERVAL_S = 0.1  # seconds between looks into the socket, while requests are in flight

Values = tuple[float, float, int]  # before, after, steps


class ChoiceStats:
    """One sample's tokens, as far as they are known. A token's last record is the one that counts."""

    def __init__(self) -> None:
        self.tokens = 0  # the reply's length
        self.records: dict[int, Values] = {}
        self.totals = np.zeros(1, dtype=TOTALS_DTYPE)

    def add_totals(self, totals: np.void) -> None:
        """Take in totals, which stand for the records of the positions that they cover."""
        add_totals(self.totals, [totals])
        for position in range(int(totals["first"]), int(totals["upto"])):
            self.records.pop(position, None)

    def missing(self) -> int:
        """Tokens of the reply of which nothing is known."""
        known = int(self.totals["tokens"][0]) + sum(position < self.tokens for position in self.records)
        return max(0, self.tokens - known)

    def settle(self) -> None:
        """The reply is over: what lies past its end is dropped, the rest is totalled."""
        self.records = {position: self.records[position] for position in sorted(self.records) if position < self.tokens}
        values = np.array(list(self.records.values()), dtype=VALUES_DTYPE)
        add_tokens(self.totals, np.zeros(len(values), dtype=np.intp), values)


class RequestStats:
    """One engine request: its choices, and what became of it."""

    def __init__(self, number: int, method: str, choices: int) -> None:
        self.number = number
        self.method = method
        self.choices = [ChoiceStats() for _ in range(choices)]
        self.finished = False  # in the engine; records may be on their way
        self.settled = asyncio.Event()

    async def wait(self) -> None:
        """Wait until the stats are final: RESPONSE_TIMEOUT_S after the last token at the latest."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.settled.wait(), 2 * RESPONSE_TIMEOUT_S)

    def complete(self) -> bool:
        """Whether nothing more is needed."""
        return self.finished and not any(choice.missing() for choice in self.choices)


class StatsCollector:
    """The table of requests in flight, and the socket that the workers send to."""

    def __init__(self, metrics: Metrics, place: str, number: int = 0) -> None:
        """`place`: as `channels.place` has it. `number`: this API server's, of those before one engine."""
        self.metrics = metrics
        self.channel = transport.new_socket_name(number)
        self.tallies: dict[int, RequestStats] = {}
        self.numbers = itertools.count()
        self.socket = transport.listen(zmq.Context.instance(), place, self.channel)
        self.ending: set[int] = set()  # requests that have left the engine, and whose records have not all come
        self.ticking = False

    def tally(self, params: Params, choices: int) -> RequestStats:
        """A tally for a request with so many samples, not yet in the table."""
        return RequestStats(next(self.numbers), params.method, choices)

    def report(self, tally: RequestStats, every_token: bool) -> dict[str, Any]:
        """What the request's `extra_args` have to carry."""
        return {RETURN_ADDRESS_KEY: [self.channel, tally.number, 0, every_token]}

    def open(self, tally: RequestStats) -> None:
        """The request goes to the engine."""
        self.tallies[tally.number] = tally
        self._tracked()
        if not self.ticking:
            self._tick()

    def finish(self, tally: RequestStats, grace: float) -> None:
        """The request has left the engine: settle it now, or `grace` seconds later."""
        if tally.finished:
            return
        tally.finished = True
        self._drain()
        if tally.complete():
            self._settle(tally)
        else:
            self._watch({*self.ending, tally.number})
            asyncio.get_running_loop().call_later(grace, self._settle, tally)

    def _watch(self, ending: set[int]) -> None:
        """Look into the socket at once while any request is ending, and otherwise in bulk, by `_tick` and `finish`.

        There is a message for each step of the engine: to wake up as often would cost more than all else here.
        """
        descriptor = int(self.socket.getsockopt(zmq.FD))
        if ending and not self.ending:
            asyncio.get_running_loop().add_reader(descriptor, self._drain)
        elif self.ending and not ending:
            asyncio.get_running_loop().remove_reader(descriptor)
        self.ending = ending

    def _tick(self) -> None:
        self._drain()
        self.ticking = bool(self.tallies)
        if self.ticking:
            asyncio.get_running_loop().call_later(POLL_INTERVAL_S, self._tick)

    def _drain(self) -> None:
        while self.socket.poll(0):  # all: the descriptor does not tell again of what is left
            channel, *message = self.socket.recv_multipart()
            if secrets.compare_digest(channel, self.channel.encode()):  # by TCP anyone can send
                self.receive(b"".join(message))

    def receive(self, message: bytes) -> None:
        """Take in a message's records; those of requests that are settled come too late."""
        tokens, totals, header = unpack(message)
        touched = set()
        for row in totals:  # first: tokens in the same message are not in them
            if choice := self._choice(int(row["request"]), int(row["choice"])):
                choice.add_totals(row)
                touched.add(int(row["request"]))
        for number, index, position, *values in tokens.tolist():
            if choice := self._choice(number, index):
                choice.records[position] = tuple(values)
                touched.add(number)
        self.metrics.observe_worker(float(header["seconds"]), int(header["dropped"]))
        for number in touched:
            if self.tallies[number].complete():
                self._settle(self.tallies[number])

    def _choice(self, number: int, index: int) -> ChoiceStats | None:
        tally = self.tallies.get(number)
        return tally.choices[index] if tally and index < len(tally.choices) else None

    def _tracked(self) -> None:
        self.metrics.tracked.labels(self.metrics.model).set(len(self.tallies))

    def _settle(self, tally: RequestStats) -> None:
        if self.tallies.pop(tally.number, None) is None:
            return  # already
        self._watch(self.ending - {tally.number})
        self._tracked()
        for choice in tally.choices:
            missing = choice.missing()
            choice.settle()
            self.metrics.observe_choice(tally.method, choice.totals, missing)
        tally.settled.set()


def summarize(index: int, parts: Sequence[ChoiceStats], every_token: bool) -> dict[str, Any]:
    """The response's entry for one choice, which may have been generated in several `parts`. Contract: docs/http.md."""
    totals = np.zeros(1, dtype=TOTALS_DTYPE)
    add_totals(totals, [part.totals[0] for part in parts])
    row = totals[0]
    measured = int(row["tokens"] - row["passed_through"])
    tokens = sum(part.tokens for part in parts)
    entry: dict[str, Any] = {
        "index": index,
        "tokens": tokens,
        "optimized_tokens": int(row["optimized"]),
        "missing": max(0, tokens - int(row["tokens"])),
        "entropy_before": _nats(float(row["before_sum"]) / measured) if measured else None,
        "entropy_after": _nats(float(row["after_sum"]) / measured) if measured else None,
        "steps": int(row["steps"]),
    }
    if every_token:
        entry["per_token"] = [_token(part.records.get(i)) for part in parts for i in range(part.tokens)]
    return entry


def _token(values: Values | None) -> dict[str, Any] | None:
    if values is None:
        return None  # missing
    before, after, steps = values
    return {"before": _nats(before), "after": _nats(after), "steps": steps}


def _nats(entropy: float) -> float | None:
    """Six decimals, below float32's own error on a large vocabulary; None where it was not measured (NaN)."""
    return None if math.isnan(entropy) else round(max(entropy, 0.0), 6)
