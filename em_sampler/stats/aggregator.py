"""What the worker owes each API server: whose request is in each slot, and which of its tokens are still to be sent.

Knows neither devices nor sockets; used by the one thread of telemetry.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from em_sampler.params import RETURN_ADDRESS_KEY
from em_sampler.stats.transport import SOCKET_NAME
from em_sampler.stats.wire import TOKEN_DTYPE, TOTALS_DTYPE, StructuredArray, add_tokens

FINAL_AFTER_TOKENS = (
    32  # tokens after which one is settled: neither sampled again nor found to lie past the end of its reply
)

Ints = NDArray[np.int64]


class ReturnAddress(NamedTuple):
    """Where a request's statistics go."""

    channel: str  # the API server
    request: int  # by the API server's count
    choice: int  # of the request's `n`
    every_token: bool  # or totals alone, for the metrics

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> "ReturnAddress | None":
        """What the API server left in `extra_args`; None where it asked for nothing."""
        match (extra_args or {}).get(RETURN_ADDRESS_KEY):
            case [str(channel), int(request), int(choice), bool(every_token)] if (
                SOCKET_NAME.fullmatch(channel) and 0 <= request < 2**63 and 0 <= choice < 2**31
            ):
                return cls(channel, request, choice, every_token)
        return None


class PendingStats:
    """What one API server is to be told: some tokens as they come, of others only the totals."""

    def __init__(self) -> None:
        self.tokens: list[StructuredArray] = []  # to be sent
        self.totals: list[StructuredArray] = []  # to be sent
        self.log: list[StructuredArray] = []  # tokens to be totalled, in the order in which they were sampled
        self.tail = np.zeros(0, dtype=TOKEN_DTYPE)  # those of before that may still change

    def waiting(self) -> bool:
        """Whether there is anything to total."""
        return bool(self.log) or len(self.tail) > 0

    def settle(self) -> None:
        """Total what will not change; tokens at the end of a request that has had no new one are sent as they are."""
        tokens, self.log = np.concatenate([self.tail, *self.log]), []
        if not len(tokens):
            return
        order = np.lexsort((tokens["position"], tokens["choice"], tokens["request"]))  # stable: the last one is last
        new = order >= len(self.tail)
        tokens = tokens[order]
        request, choice, position = (tokens[name] for name in ("request", "choice", "position"))
        other_reply = (request[1:] != request[:-1]) | (choice[1:] != choice[:-1])
        last = np.append(other_reply | (position[1:] != position[:-1]), True)  # of the records of its token
        reply = np.append(0, np.cumsum(other_reply))[last]
        tokens, new = tokens[last], new[last]
        starts = np.flatnonzero(np.diff(reply, prepend=-1))
        ends = np.append(starts[1:], len(tokens)) - 1
        silent = ~np.logical_or.reduceat(new, starts)[reply]
        settled = tokens["position"] + FINAL_AFTER_TOKENS <= tokens["position"][ends][reply]
        self.totals.append(self._totals(tokens[starts], tokens[settled], reply[settled]))
        self.tokens.append(tokens[silent & ~settled])
        self.tail = tokens[~silent & ~settled]

    def _totals(self, replies: StructuredArray, tokens: StructuredArray, rows: Ints) -> StructuredArray:
        """TOTALS of `tokens`, token i into the row `rows[i]` of `replies`; only rows that have any."""
        totals = np.zeros(len(replies), dtype=TOTALS_DTYPE)
        totals["request"], totals["choice"] = replies["request"], replies["choice"]
        totals["first"] = np.iinfo(np.uint32).max
        np.minimum.at(totals["first"], rows, tokens["position"])
        np.maximum.at(totals["upto"], rows, tokens["position"] + 1)
        add_tokens(totals, rows, tokens)
        return totals[totals["tokens"] > 0]


class SlotTable:
    """Whose request is in each slot."""

    def __init__(self, count: int) -> None:
        self.accounts: dict[str, PendingStats] = {}  # by channel
        self.shelves: list[tuple[PendingStats, bool]] = []  # every account twice: for every token, for totals
        # One more, for rows without a slot: -1.
        self.shelf = np.full(count + 1, -1)
        self.request = np.zeros(count + 1, dtype=np.uint64)
        self.choice = np.zeros(count + 1, dtype=np.uint32)

    def bind(self, slot: int, report: ReturnAddress | None) -> None:
        """A new request, or none, takes over `slot`."""
        if report is None:
            self.shelf[slot] = -1
            return
        if report.channel not in self.accounts:
            account = self.accounts[report.channel] = PendingStats()
            self.shelves += [(account, False), (account, True)]
        account = self.accounts[report.channel]
        self.shelf[slot] = self.shelves.index((account, report.every_token))
        self.request[slot], self.choice[slot] = report.request, report.choice

    def waited_for(self) -> bool:
        """Whether any slot's statistics are wanted token by token."""
        return any(self.shelves[number][1] for number in set(self.shelf.tolist()) - {-1})

    def add(self, columns: NDArray[np.int32]) -> None:
        """Rows of one or more steps [telemetry.COLUMNS, rows] go to the accounts that they belong to."""
        slots, positions, before, after, steps = columns
        tokens = np.empty(len(slots), dtype=TOKEN_DTYPE)
        tokens["request"], tokens["choice"], tokens["position"] = self.request[slots], self.choice[slots], positions
        tokens["before"], tokens["after"] = before.view(np.float32), after.view(np.float32)
        tokens["steps"] = steps
        shelf = np.where(positions < 0, -1, self.shelf[slots])
        for number in set(shelf.tolist()) - {-1}:
            account, every_token = self.shelves[number]
            (account.tokens if every_token else account.log).append(tokens[shelf == number])
