"""What a worker still has to send to each API server: stats of single tokens, and totals over many.

Knows neither devices nor sockets. Used by one thread, that of recorder.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from em_sampler.params import RETURN_ADDRESS_KEY
from em_sampler.stats.transport import SOCKET_NAME_PATTERN
from em_sampler.stats.wire import (
    CANDIDATES_DTYPE,
    TAIL_TOKENS,
    TOKEN_DTYPE,
    TOTALS_DTYPE,
    StructuredArray,
    add_tokens,
)

# A token is final once this many later ones were sampled: preemption cannot have it sampled again, a stop string cannot
# cut it off, and it is not among the last TAIL_TOKENS of a choice that a stop string cut.
FINAL_AFTER_TOKENS = 32 + TAIL_TOKENS

Ints = NDArray[np.int64]


class ReturnAddress(NamedTuple):
    """Where the stats of an engine request go. The API server puts it into `SamplingParams.extra_args`."""

    socket_name: str  # the API server's, see transport.py
    request_number: int  # counted by the API server
    choice: int  # index among the request's `n` choices
    per_token: bool  # send every token's stats as soon as possible; otherwise totals, for the metrics

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> "ReturnAddress | None":
        """Read what `to_extra_args` wrote; None if there is none, or if no API server can have written it."""
        match (extra_args or {}).get(RETURN_ADDRESS_KEY):
            case [str(socket_name), int(request_number), int(choice), bool(per_token)] if (
                SOCKET_NAME_PATTERN.fullmatch(socket_name) and 0 <= request_number < 2**63 and 0 <= choice < 2**31
            ):
                return cls(socket_name, request_number, choice, per_token)
        return None

    def to_extra_args(self) -> dict[str, Any]:
        """Return the entry for `SamplingParams.extra_args`."""
        return {RETURN_ADDRESS_KEY: list(self)}


class PendingStats:
    """What one API server has not got yet."""

    def __init__(self) -> None:
        self.tokens: list[StructuredArray] = []  # TOKEN, to be sent
        self.totals: list[StructuredArray] = []  # TOTALS, to be sent
        self.candidates: list[StructuredArray] = []  # CANDIDATES, to be sent
        self.sampled: list[StructuredArray] = []  # TOKEN, to be folded into totals, in the order of sampling
        self.not_final = np.zeros(0, dtype=TOKEN_DTYPE)  # left over from the last fold

    def has_pending(self) -> bool:
        """Return whether `fold` has anything to do."""
        return bool(self.sampled) or len(self.not_final) > 0

    def take(self) -> tuple[list[StructuredArray], list[StructuredArray], list[StructuredArray]]:
        """Return (tokens, totals, candidates) to be sent, which are then no longer here."""
        taken = self.tokens, self.totals, self.candidates
        self.tokens, self.totals, self.candidates = [], [], []
        return taken

    def fold(self) -> None:
        """Fold final tokens into totals.

        Send the other tokens one by one if their choice got none since the last fold: it may be over, and only the API
        server knows where it ends.
        """
        sampled, self.sampled = self.sampled, []  # first: what cannot be folded must not pile up
        tokens = np.concatenate([self.not_final, *sampled])
        if not len(tokens):
            return
        order = np.lexsort((tokens["position"], tokens["choice"], tokens["request_number"]))  # stable
        is_new = order >= len(self.not_final)
        tokens = tokens[order]
        request_number, choice, position = (tokens[name] for name in ("request_number", "choice", "position"))
        next_is_other_choice = (request_number[1:] != request_number[:-1]) | (choice[1:] != choice[:-1])
        # A position sampled several times counts as it was sampled last.
        latest = np.append(next_is_other_choice | (position[1:] != position[:-1]), True)
        choice_of_token = np.append(0, np.cumsum(next_is_other_choice))[latest]  # 0, 0, 1, 1, 1, 2, ...
        tokens, is_new = tokens[latest], is_new[latest]
        starts = np.flatnonzero(np.diff(choice_of_token, prepend=-1))
        ends = np.append(starts[1:], len(tokens)) - 1
        idle = ~np.logical_or.reduceat(is_new, starts)[choice_of_token]
        final = tokens["position"] + FINAL_AFTER_TOKENS <= tokens["position"][ends][choice_of_token]
        self.totals.append(self._totals(tokens[starts], tokens[final], choice_of_token[final]))
        self.tokens.append(tokens[idle & ~final])
        self.not_final = tokens[~idle & ~final]

    def _totals(self, choices: StructuredArray, tokens: StructuredArray, rows: Ints) -> StructuredArray:
        """Return TOTALS of `tokens`: token i belongs to `choices[rows[i]]`. Choices without any have no row."""
        totals = np.zeros(len(choices), dtype=TOTALS_DTYPE)
        totals["request_number"], totals["choice"] = choices["request_number"], choices["choice"]
        totals["first"] = np.iinfo(np.uint32).max
        np.minimum.at(totals["first"], rows, tokens["position"])
        np.maximum.at(totals["end"], rows, tokens["position"] + 1)
        add_tokens(totals, rows, tokens, tokens["position"])
        return totals[totals["tokens"] > 0]


class SlotTable:
    """Which request is in each slot, and what its API server still has to get."""

    def __init__(self, slots: int) -> None:
        self.pending: dict[str, PendingStats] = {}  # by socket name
        self.routes: list[tuple[PendingStats, bool]] = []  # two per API server: totals only, and per token
        # By slot, and a last entry for rows without a slot (-1).
        self.route = np.full(slots + 1, -1)  # index into `routes`; -1: nobody wants the stats
        self.request_number = np.zeros(slots + 1, dtype=np.uint64)
        self.choice = np.zeros(slots + 1, dtype=np.uint32)

    def assign(self, slot: int, return_address: ReturnAddress | None) -> None:
        """Assign `slot` to a request, or to nobody who wants stats."""
        if return_address is None:
            self.route[slot] = -1
            return
        socket_name, request_number, choice, per_token = return_address
        if socket_name not in self.pending:
            new = self.pending[socket_name] = PendingStats()
            self.routes += [(new, False), (new, True)]
        self.route[slot] = self.routes.index((self.pending[socket_name], per_token))
        self.request_number[slot], self.choice[slot] = request_number, choice

    def any_per_token(self) -> bool:
        """Return whether any slot's stats are to be sent token by token."""
        return any(self.routes[route][1] for route in set(self.route.tolist()) - {-1})

    def has_pending(self) -> bool:
        """Return whether `fold` has anything to do."""
        return any(pending.has_pending() for pending in self.pending.values())

    def fold(self) -> None:
        """Fold the final tokens of all API servers into totals."""
        for pending in self.pending.values():
            pending.fold()

    def add_candidates(self, slots: NDArray[np.int32], positions: NDArray[np.int32], found: NDArray[np.int32]) -> None:
        """Take candidates ([3, rows, k], see candidates.py) of rows with these slots and positions where they belong.

        Rows of requests that did not ask for single tokens are dropped, and so are rows in prefill (position -1).
        """
        candidates = np.empty(len(slots), dtype=CANDIDATES_DTYPE)
        candidates["request_number"], candidates["choice"] = self.request_number[slots], self.choice[slots]
        candidates["position"], candidates["id"] = positions, 0
        candidates["before"] = candidates["after"] = np.nan
        ids, before, after = found
        k = ids.shape[1]
        candidates["id"][:, :k] = ids
        candidates["before"][:, :k], candidates["after"][:, :k] = before.view(np.float32), after.view(np.float32)
        route_of_row = np.where(positions < 0, -1, self.route[slots])
        for route in set(route_of_row.tolist()) - {-1}:
            pending, per_token = self.routes[route]
            if per_token:
                pending.candidates.append(candidates[route_of_row == route])

    def add(self, step_stats: NDArray[np.int32]) -> None:
        """Take the rows of one or more steps, [recorder.STEP_FIELDS, rows], to the API servers that want them."""
        slots, positions, before, after, varentropy, steps = step_stats
        tokens = np.empty(len(slots), dtype=TOKEN_DTYPE)
        tokens["request_number"], tokens["choice"] = self.request_number[slots], self.choice[slots]
        tokens["position"], tokens["steps"] = positions, steps
        for name, values in (("before", before), ("after", after), ("varentropy", varentropy)):
            tokens[name] = values.view(np.float32)
        route_of_row = np.where(positions < 0, -1, self.route[slots])
        for route in set(route_of_row.tolist()) - {-1}:
            pending, per_token = self.routes[route]
            (pending.tokens if per_token else pending.sampled).append(tokens[route_of_row == route])
