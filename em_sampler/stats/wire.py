"""What workers send to API servers: the stats of single tokens, and totals over many. Both ends share it.

A server takes any bytes: what is not a message of this version, or cannot be true, is rejected with its reason.

Entropies are in nats. NaN means not measured: the row held NaN or +inf and was passed through.
"""

import itertools
import secrets
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from em_sampler.params import CUT, MAX_STEPS, MAX_TOP

# Upper bounds of the histograms' buckets, in nats; one more bucket is above the last. ln 160,000 = 12.
ENTROPY_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0)

TAIL_TOKENS = 32  # at the end of a choice, whose mean entropy a summary has; workers send these one by one

# One token's entropy before and after the method, its varentropy before it (NaN: not asked for), and the gradient steps
# between them (CUT: the method removed tokens).
VALUES_DTYPE = np.dtype([("before", "f4"), ("after", "f4"), ("varentropy", "f4"), ("steps", "i4")])
# A token's place: request (numbered by its API server), choice, and position in the choice.
_PLACE = [("request_number", "u8"), ("choice", "u4"), ("position", "u4")]
TOKEN_DTYPE = np.dtype([*_PLACE, *VALUES_DTYPE.descr])
# What could have been at that place, the likeliest after the method first: token ids, and their probabilities before
# and after the method (NaN: fewer candidates than that).
CANDIDATES_DTYPE = np.dtype([*_PLACE, ("id", "u4", MAX_TOP), ("before", "f4", MAX_TOP), ("after", "f4", MAX_TOP)])
HISTOGRAMS = ("before", "after", "reduction")
# Many tokens of one choice. All of them have positions in range(first, end).
TOTALS_DTYPE = np.dtype(
    [
        ("request_number", "u8"),
        ("choice", "u4"),
        ("first", "u4"),
        ("end", "u4"),
        ("tokens", "u8"),
        ("optimized", "u8"),  # tokens whose distribution was changed
        ("steps", "u8"),
        ("passed_through", "u8"),  # tokens not measured
        ("varentropy_sum", "f8"),  # NaN: not asked for
        ("highest", "f4"),  # entropy before the method, and the position of a token that has it
        ("highest_position", "u4"),
        *((f"{name}_sum", "f8") for name in HISTOGRAMS),
        *((f"{name}_counts", "u4", (len(ENTROPY_BUCKETS) + 1,)) for name in HISTOGRAMS),
    ]
)
_NOT_SUMMED = ("request_number", "choice", "first", "end", "highest", "highest_position")
SUMMED_FIELDS = [name for name in TOTALS_DTYPE.names or () if name not in _NOT_SUMMED]

# The start of a message: what it is, whom it is for, and how many TOKEN, TOTALS and CANDIDATES rows follow. Since the
# worker's last message: seconds spent in the transform, and rows lost on the way.
MAGIC, VERSION = b"EMST", 3  # change VERSION with any of the types above or MAX_ROWS
HEADER_DTYPE = np.dtype(
    [
        ("magic", "S4"),
        ("version", "u4"),
        ("socket_name", "S40"),
        ("tokens", "u4"),
        ("totals", "u4"),
        ("candidates", "u4"),
        ("seconds", "f8"),
        ("dropped", "u8"),
    ]
)
MAX_ROWS = 2048  # of a message; a worker with more sends several
# What no worker can have measured is out of range.
MAX_POSITION = 2**24
MAX_NATS = 100.0
MAX_VARENTROPY = MAX_NATS**2
MAX_SECONDS = 1e6
MAX_DROPPED = 2**40
MAX_PROBABILITY = 1.001  # float32's sums over a vocabulary round

StructuredArray = NDArray[np.void]


def add_tokens(
    totals: StructuredArray, rows: NDArray[np.integer], tokens: StructuredArray, positions: NDArray[np.integer]
) -> None:
    """Count `tokens` (VALUES or TOKEN, [n]), which have these positions, into `totals` (TOTALS), i into `rows[i]`."""
    measured = ~np.isnan(tokens["before"])
    np.add.at(totals["tokens"], rows, 1)
    np.add.at(totals["optimized"], rows, tokens["steps"] != 0)
    np.add.at(totals["steps"], rows, np.maximum(tokens["steps"], 0).astype(np.uint64))
    np.add.at(totals["passed_through"], rows, ~measured)
    rows, tokens, positions = rows[measured], tokens[measured], positions[measured]
    before, after = tokens["before"], tokens["after"]
    # Sums are exported as counters, which never fall: an entropy that rose counts as no reduction.
    for name, values in zip(HISTOGRAMS, (before, after, np.maximum(before - after, 0)), strict=True):
        np.add.at(totals[f"{name}_sum"], rows, values)
        np.add.at(totals[f"{name}_counts"], (rows, np.searchsorted(ENTROPY_BUCKETS, values)), 1)
    np.add.at(totals["varentropy_sum"], rows, tokens["varentropy"])
    order = np.lexsort((before, rows))
    of_row = order[np.flatnonzero(np.diff(rows[order], append=-1))]  # each row's token with the highest entropy
    for row, entropy, position in zip(rows[of_row], before[of_row], positions[of_row], strict=True):
        _raise_highest(totals, row, entropy, position)


def add_totals(target: StructuredArray, others: Iterable[np.void]) -> None:
    """Add the counts and sums of `others` (TOTALS) to the one row of `target` (TOTALS, [1])."""
    for other in others:
        for name in SUMMED_FIELDS:
            target[name] += other[name]
        _raise_highest(target, 0, other["highest"], other["highest_position"])


def _raise_highest(totals: StructuredArray, row: int, entropy: float, position: int) -> None:
    if entropy > totals["highest"][row]:
        totals["highest"][row], totals["highest_position"][row] = entropy, position


class Message(NamedTuple):
    """A worker's message, read. Its rows may be out of range."""

    tokens: StructuredArray  # TOKEN
    totals: StructuredArray  # TOTALS
    header: np.void  # HEADER
    candidates: StructuredArray  # CANDIDATES


class MessageError(Exception):
    """A message that is not taken in. `reason`: one of REJECTION_REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


# Not a message of this format at all; of another version; for another server; rows that cannot be true.
REJECTION_REASONS = ("malformed", "version", "recipient", "out_of_range")


def pack(
    socket_name: str,
    tokens: Sequence[StructuredArray],
    totals: Sequence[StructuredArray],
    seconds: float,
    dropped: int,
    candidates: Sequence[StructuredArray] = (),
) -> bytes:
    """Make a worker's message to an API server, of at most MAX_ROWS rows. `seconds`, `dropped`: see HEADER_DTYPE."""
    counts = [sum(map(len, rows)) for rows in (tokens, totals, candidates)]
    header = np.array((MAGIC, VERSION, socket_name.encode(), *counts, seconds, dropped), dtype=HEADER_DTYPE)
    return b"".join(part.tobytes() for part in (header, *tokens, *totals, *candidates))


def unpack(message: bytes, socket_name: str) -> Message:
    """Read a message to `socket_name`.

    Raises:
        MessageError: if it is not such a message, whatever its bytes.
    """
    if len(message) < HEADER_DTYPE.itemsize or not message.startswith(MAGIC):
        raise MessageError("malformed")
    header: np.void = np.frombuffer(message, HEADER_DTYPE, count=1)[0]
    if header["version"] != VERSION:
        raise MessageError("version")
    if not secrets.compare_digest(bytes(header["socket_name"]), socket_name.encode()):
        raise MessageError("recipient")
    parts = [(TOKEN_DTYPE, "tokens"), (TOTALS_DTYPE, "totals"), (CANDIDATES_DTYPE, "candidates")]
    counts = [int(header[name]) for _, name in parts]
    sizes = [count * dtype.itemsize for count, (dtype, _) in zip(counts, parts, strict=True)]
    if sum(counts) > MAX_ROWS or len(message) != HEADER_DTYPE.itemsize + sum(sizes):
        raise MessageError("malformed")
    if not 0 <= header["seconds"] <= MAX_SECONDS or header["dropped"] > MAX_DROPPED:  # NaN is in no range
        raise MessageError("out_of_range")
    starts = itertools.accumulate(sizes, initial=HEADER_DTYPE.itemsize)
    tokens, totals, candidates = (
        np.frombuffer(message, dtype, count, start)
        for (dtype, _), count, start in zip(parts, counts, starts, strict=False)
    )
    return Message(tokens, totals, header, candidates)


def tokens_in_range(tokens: StructuredArray) -> NDArray[np.bool_]:
    """Return which TOKEN rows a worker can have measured."""
    before, after = tokens["before"], tokens["after"]
    measured = (np.abs(before) <= MAX_NATS) & (np.abs(after) <= MAX_NATS)
    passed_through = np.isnan(before) & np.isnan(after)
    steps = (tokens["steps"] >= CUT) & (tokens["steps"] <= MAX_STEPS)
    varentropy = np.isnan(tokens["varentropy"]) | (np.abs(tokens["varentropy"]) <= MAX_VARENTROPY)
    good: NDArray[np.bool_] = (measured | passed_through) & steps & varentropy & (tokens["position"] < MAX_POSITION)
    return good


def candidates_in_range(candidates: StructuredArray) -> NDArray[np.bool_]:
    """Return which CANDIDATES rows a worker can have found."""
    before, after = candidates["before"], candidates["after"]
    found = (before >= 0) & (before <= MAX_PROBABILITY) & (after >= 0) & (after <= MAX_PROBABILITY)
    absent = np.isnan(before) & np.isnan(after)
    good: NDArray[np.bool_] = (found | absent).all(axis=1) & (candidates["position"] < MAX_POSITION)
    return good


def totals_in_range(totals: StructuredArray) -> NDArray[np.bool_]:
    """Return which TOTALS rows a worker can have counted."""
    tokens = totals["tokens"]
    good = (totals["first"] <= totals["end"]) & (totals["end"] <= MAX_POSITION)
    good &= tokens <= totals["end"] - totals["first"]
    good &= (totals["optimized"] <= tokens) & (totals["passed_through"] <= tokens)
    good &= totals["steps"] <= tokens * MAX_STEPS
    good &= np.isnan(totals["varentropy_sum"]) | (np.abs(totals["varentropy_sum"]) <= tokens * MAX_VARENTROPY)
    good &= (totals["highest"] >= 0) & (totals["highest"] <= MAX_NATS) & (totals["highest_position"] < MAX_POSITION)
    for name in HISTOGRAMS:
        good &= np.abs(totals[f"{name}_sum"]) <= tokens * MAX_NATS
        good &= totals[f"{name}_counts"].sum(axis=1, dtype=np.uint64) == tokens - totals["passed_through"]
    return good
