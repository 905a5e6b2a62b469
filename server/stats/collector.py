"""Stats of the requests in flight: the workers' messages in, summaries out. Knows no HTTP and no vLLM.

If stats are late, a response waits RESPONSE_TIMEOUT_S for them and then goes without. Whatever arrives, no request
fails for it: a message that cannot be taken in is counted and dropped.
"""

import asyncio
import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import zmq

from em_sampler.params import Params
from em_sampler.stats import transport
from em_sampler.stats.aggregator import ReturnAddress
from em_sampler.stats.wire import (
    TAIL_TOKENS,
    TOTALS_DTYPE,
    VALUES_DTYPE,
    MessageError,
    add_tokens,
    add_totals,
    candidates_in_range,
    tokens_in_range,
    totals_in_range,
    unpack,
)
from server.stats.metrics import Metrics

logger = logging.getLogger(__name__)

RESPONSE_TIMEOUT_S = 0.5  # how long a response waits for the last of its stats
METRICS_TIMEOUT_S = 5.0  # the same if no response waits, only the metrics
POLL_INTERVAL_S = 0.1  # how often the socket is read while requests are in flight
MAX_FRAMES_PER_TURN = 32  # of the event loop; about 30 ms if each is as large as can be

TokenStats = tuple[float, float, float, int]  # entropy before and after, varentropy, steps: as in VALUES_DTYPE
TokenTexts = Callable[[list[int]], Mapping[int, str]]  # the text of each token id that the tokenizer knows


class ChoiceStats:
    """The stats of one choice, as far as they are known."""

    def __init__(self) -> None:
        self.tokens = 0  # the choice's length
        self.by_position: dict[int, TokenStats] = {}  # a token's last stats count
        self.totals = np.zeros(1, dtype=TOTALS_DTYPE)  # of tokens that are not in `by_position`
        self.candidates: dict[int, np.void] = {}  # by position, a row of CANDIDATES

    def add_totals(self, totals: np.void) -> None:
        """Add TOTALS from a worker; they replace the single tokens at their positions."""
        add_totals(self.totals, [totals])
        first, end = int(totals["first"]), int(totals["end"])
        for position in [position for position in self.by_position if first <= position < end]:
            del self.by_position[position]

    def missing(self) -> int:
        """Count the choice's tokens without stats."""
        known = int(self.totals["tokens"][0]) + sum(position < self.tokens for position in self.by_position)
        return max(0, self.tokens - known)

    def finalize(self) -> None:
        """Drop what lies past the choice's end and add the rest to the totals; `by_position` keeps it, in order."""
        positions = sorted(position for position in self.by_position if position < self.tokens)
        self.by_position = {position: self.by_position[position] for position in positions}
        values = np.array(list(self.by_position.values()), dtype=VALUES_DTYPE)
        add_tokens(self.totals, np.zeros(len(values), dtype=np.intp), values, np.array(positions, dtype=np.int64))


class RequestStats:
    """The stats of one engine request."""

    def __init__(self, number: int, method: str, choices: int) -> None:
        self.number = number  # counted by this API server
        self.method = method
        self.choices = [ChoiceStats() for _ in range(choices)]
        self.finished = False  # in the engine; stats may still be on their way
        self.final = asyncio.Event()  # they can no longer change

    async def wait(self) -> None:
        """Wait until the stats are final: RESPONSE_TIMEOUT_S after the last token at the latest."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.final.wait(), 2 * RESPONSE_TIMEOUT_S)

    def is_complete(self) -> bool:
        """Return whether the request has finished and no token's stats are missing."""
        return self.finished and not any(choice.missing() for choice in self.choices)


class StatsCollector:
    """The requests in flight by number, and the socket that workers send their stats to."""

    def __init__(self, metrics: Metrics, server_address: str, server_index: int = 0) -> None:
        """Listen for stats.

        Args:
            metrics: get each request's stats once they are final.
            server_address: see `transport.server_address`.
            server_index: this API server's among those of one engine (vLLM's --api-server-count).
        """
        self.metrics = metrics
        self.socket_name = transport.new_socket_name(server_index)
        self.socket = transport.listen(server_address, self.socket_name)
        self.numbers = itertools.count()
        self.requests: dict[int, RequestStats] = {}
        self.waiting: set[int] = set()  # numbers of requests that have finished and whose stats are incomplete
        self.is_polling = False  # while requests are in flight
        self.is_watched = False  # read as soon as anything arrives
        self.is_reading = False  # the next turn of the loop goes on reading
        self.in_multipart = False  # the next frame belongs to the same message as the last
        self._watch()

    def new_request(self, params: Params, choices: int) -> RequestStats:
        """Make the stats of a request with this many choices. It is not in flight before `start`."""
        return RequestStats(next(self.numbers), params.method, choices)

    def return_address(self, request: RequestStats, per_token: bool) -> ReturnAddress:
        """Return where the workers must send the request's stats (choice 0)."""
        return ReturnAddress(self.socket_name, request.number, 0, per_token)

    def start(self, request: RequestStats) -> None:
        """Take in a request's stats from now on: it goes to the engine."""
        self.requests[request.number] = request
        self._update_gauge()
        self._watch()
        if not self.is_polling:
            self._poll()

    def finish(self, request: RequestStats, timeout_s: float) -> None:
        """Finalize a request that has left the engine, now or `timeout_s` later if stats are missing."""
        if request.finished:
            return
        request.finished = True
        self._read_socket()
        if request.is_complete():
            self._finalize(request)
        else:
            self.waiting.add(request.number)
            self._watch()
            asyncio.get_running_loop().call_later(timeout_s, self._finalize, request)

    def receive(self, message: bytes) -> None:
        """Take in a worker's message; stats of requests that are final already are ignored.

        Raises:
            MessageError: if it is none, or holds rows that no worker can have sent; the others are taken in.
        """
        tokens, totals, header, candidates = unpack(message, self.socket_name)
        good_tokens, good_totals = tokens[tokens_in_range(tokens)], totals[totals_in_range(totals)]
        good_candidates = candidates[candidates_in_range(candidates)]
        changed = set()
        for row in good_totals:  # first: they do not include the tokens of the same message
            if choice := self._find(int(row["request_number"]), int(row["choice"])):
                choice.add_totals(row)
                changed.add(int(row["request_number"]))
        for number, index, position, *values in good_tokens.tolist():
            if choice := self._find(number, index):
                choice.by_position[position] = tuple(values)
                changed.add(number)
        for row in good_candidates:
            if choice := self._find(int(row["request_number"]), int(row["choice"])):
                choice.candidates[int(row["position"])] = row.copy()  # without the rest of the message
        self.metrics.observe_worker(float(header["seconds"]), int(header["dropped"]))
        for number in changed:
            if self.requests[number].is_complete():
                self._finalize(self.requests[number])
        if [*map(len, (good_tokens, good_totals, good_candidates))] != [*map(len, (tokens, totals, candidates))]:
            raise MessageError("out_of_range")

    def _watch(self) -> None:
        """Read the socket at once while a response waits or no request is in flight, otherwise in bulk, by `_poll`.

        In flight, there is a message for each step of the engine: to wake up as often would cost more than all else
        here. Without requests nothing should come; what comes must not pile up.
        """
        watched = bool(self.waiting) or not self.requests
        descriptor = int(self.socket.getsockopt(zmq.FD))
        if watched and not self.is_watched:
            asyncio.get_running_loop().add_reader(descriptor, self._read_socket)
        elif self.is_watched and not watched:
            asyncio.get_running_loop().remove_reader(descriptor)
        self.is_watched = watched

    def _poll(self) -> None:
        self.is_polling = bool(self.requests)
        if self.is_polling:
            asyncio.get_running_loop().call_later(POLL_INTERVAL_S, self._poll)
        self._read_socket()

    def _read_socket(self) -> None:
        """Read what is there, but only so much in a turn of the loop, which has other work."""
        for _ in range(MAX_FRAMES_PER_TURN):
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.ZMQError:  # nothing left
                return
            self._take(frame)
        # To the end: ZMQ's descriptor does not become readable again for what is left.
        if not self.is_reading:
            self.is_reading = True
            asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        self.is_reading = False
        self._read_socket()

    def _take(self, frame: bytes) -> None:
        """Take in a frame that is a message by itself; count what cannot be taken in."""
        has_more = bool(self.socket.getsockopt(zmq.RCVMORE))
        is_message = not has_more and not self.in_multipart
        is_first, self.in_multipart = not self.in_multipart, has_more
        try:
            if is_message:
                self.receive(frame)
            elif is_first:
                raise MessageError("malformed")
        except MessageError as error:
            self.metrics.observe_rejected(error.reason)
        except Exception:
            logger.exception("em_inf: statistics of a worker's message were lost")

    def _find(self, number: int, index: int) -> ChoiceStats | None:
        request = self.requests.get(number)
        return request.choices[index] if request and index < len(request.choices) else None

    def _update_gauge(self) -> None:
        self.metrics.tracked.labels(self.metrics.model).set(len(self.requests))

    def _finalize(self, request: RequestStats) -> None:
        if self.requests.pop(request.number, None) is None:
            return  # final already
        self.waiting.discard(request.number)
        self._watch()
        self._update_gauge()
        for choice in request.choices:
            missing = choice.missing()
            choice.finalize()
            self.metrics.observe_choice(request.method, choice.totals, missing)
        request.final.set()


def summarize(
    index: int, parts: Sequence[ChoiceStats], per_token: bool, top: int = 0, texts: TokenTexts | None = None
) -> dict[str, Any]:
    """Make the response's summary of one choice from its final stats. Contract: docs/http.md.

    Args:
        index: the choice's.
        parts: in order; several if several engine requests made the choice.
        per_token: add every token's stats.
        top: with them, so many candidates.
        texts: the candidates' texts; null without.
    """
    totals = np.zeros(1, dtype=TOTALS_DTYPE)
    add_totals(totals, [part.totals[0] for part in parts])
    row = totals[0]
    measured = int(row["tokens"] - row["passed_through"])
    tokens = sum(part.tokens for part in parts)
    starts = itertools.accumulate((part.tokens for part in parts), initial=0)
    highest, position = max(
        (
            (float(part.totals[0]["highest"]), start + int(part.totals[0]["highest_position"]))
            for part, start in zip(parts, starts, strict=False)
        ),
        key=lambda place: place[0],
    )
    summary: dict[str, Any] = {
        "index": index,
        "tokens": tokens,
        "optimized_tokens": int(row["optimized"]),
        "missing": max(0, tokens - int(row["tokens"])),
        "entropy_before": _nats(float(row["before_sum"]) / measured) if measured else None,
        "entropy_after": _nats(float(row["after_sum"]) / measured) if measured else None,
        "entropy_max": _nats(highest) if measured else None,
        "entropy_max_position": position if measured else None,
        "entropy_tail": _tail(parts),
        "varentropy": _nats(float(row["varentropy_sum"]) / measured) if measured else None,
        "steps": int(row["steps"]),
    }
    if per_token:
        summary["per_token"] = _per_token(parts, top, texts)
    return summary


def _per_token(parts: Sequence[ChoiceStats], top: int, texts: TokenTexts | None) -> list[dict[str, Any] | None]:
    tokens = [_token(part.by_position.get(i)) for part in parts for i in range(part.tokens)]
    if top:
        rows = [part.candidates.get(i) for part in parts for i in range(part.tokens)]
        ids = list({token_id for row in rows if row is not None for token_id in row["id"][:top].tolist()})
        text_of = texts(ids) if texts else {}
        for token, row in zip(tokens, rows, strict=True):
            if token:
                token["top"] = _candidates(row, top, text_of)
    return tokens


def _candidates(row: np.void | None, top: int, text_of: Mapping[int, str]) -> list[dict[str, Any]] | None:
    """Return the first `top` candidates of one token."""
    if row is None:
        return None  # missing
    columns = (row[name][:top].tolist() for name in ("id", "before", "after"))
    return [
        {"id": token_id, "token": text_of.get(token_id), "before": _probability(before), "after": _probability(after)}
        for token_id, before, after in zip(*columns, strict=True)
        if not math.isnan(before)
    ]


def _tail(parts: Sequence[ChoiceStats]) -> float | None:
    """Return the mean entropy before the method of the last TAIL_TOKENS tokens, of those that were measured."""
    tail: list[float] = []
    wanted = TAIL_TOKENS
    for part in reversed(parts):
        first = max(0, part.tokens - wanted)
        tail += [part.by_position[i][0] for i in range(first, part.tokens) if i in part.by_position]
        wanted -= part.tokens - first
    measured = [entropy for entropy in tail if not math.isnan(entropy)]
    return _nats(sum(measured) / len(measured)) if measured else None


def _token(stats: TokenStats | None) -> dict[str, Any] | None:
    if stats is None:
        return None  # missing
    before, after, varentropy, steps = stats
    return {"before": _nats(before), "after": _nats(after), "varentropy": _nats(varentropy), "steps": max(steps, 0)}


def _probability(p: float) -> float:
    """Round to six digits, which float32 has."""
    return min(float(f"{p:.6g}"), 1.0)


def _nats(entropy: float) -> float | None:
    """Round to six decimals, below float32's error on a large vocabulary; None if not finite: JSON lacks that."""
    return round(max(entropy, 0.0), 6) if math.isfinite(entropy) else None
