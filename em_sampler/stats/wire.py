"""What workers send to API servers: the stats of single tokens, and totals over many. NumPy alone; both ends share it.

Entropies are in nats. NaN means not measured: the row held NaN or +inf and was passed through.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

# Upper bounds of the histograms' buckets, in nats; one more bucket is above the last. ln 160,000 = 12.
ENTROPY_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0)

# One token's entropy before and after the method, and the gradient steps between them.
VALUES_DTYPE = np.dtype([("before", "f4"), ("after", "f4"), ("steps", "i4")])
# The same with the token's place: request (numbered by its API server), choice, and position in the choice.
TOKEN_DTYPE = np.dtype([("request_number", "u8"), ("choice", "u4"), ("position", "u4"), *VALUES_DTYPE.descr])
HISTOGRAMS = ("before", "after", "reduction")
# Many tokens of one choice. All of them have positions in range(first, end).
TOTALS_DTYPE = np.dtype(
    [
        ("request_number", "u8"),
        ("choice", "u4"),
        ("first", "u4"),
        ("end", "u4"),
        ("tokens", "u8"),
        ("optimized", "u8"),  # tokens that took at least one step
        ("steps", "u8"),
        ("passed_through", "u8"),  # tokens not measured
        *((f"{name}_sum", "f8") for name in HISTOGRAMS),
        *((f"{name}_counts", "u4", (len(ENTROPY_BUCKETS) + 1,)) for name in HISTOGRAMS),
    ]
)
SUMMED_FIELDS = [name for name in TOTALS_DTYPE.names or () if name not in ("request_number", "choice", "first", "end")]

# The start of a message: how many TOKEN and TOTALS rows follow. Since the worker's last message: seconds spent in the
# transform, and rows lost on the way.
HEADER_DTYPE = np.dtype([("tokens", "u4"), ("totals", "u4"), ("seconds", "f8"), ("dropped", "u8")])

StructuredArray = NDArray[np.void]


def add_tokens(totals: StructuredArray, rows: NDArray[np.intp], tokens: StructuredArray) -> None:
    """Count `tokens` (VALUES or TOKEN, [n]) into `totals` (TOTALS), token i into row `rows[i]`."""
    measured = ~np.isnan(tokens["before"])
    np.add.at(totals["tokens"], rows, 1)
    np.add.at(totals["optimized"], rows, tokens["steps"] > 0)
    np.add.at(totals["steps"], rows, tokens["steps"].astype(np.uint64))
    np.add.at(totals["passed_through"], rows, ~measured)
    rows, before, after = rows[measured], tokens["before"][measured], tokens["after"][measured]
    # Sums are exported as counters, which never fall: an entropy that rose counts as no reduction.
    for name, values in zip(HISTOGRAMS, (before, after, np.maximum(before - after, 0)), strict=True):
        np.add.at(totals[f"{name}_sum"], rows, values)
        np.add.at(totals[f"{name}_counts"], (rows, np.searchsorted(ENTROPY_BUCKETS, values)), 1)


def add_totals(target: StructuredArray, others: Iterable[np.void]) -> None:
    """Add the counts and sums of `others` (TOTALS) to the one row of `target` (TOTALS, [1])."""
    for other in others:
        for name in SUMMED_FIELDS:
            target[name] += other[name]


def pack(tokens: Sequence[StructuredArray], totals: Sequence[StructuredArray], seconds: float, dropped: int) -> bytes:
    """Make a worker's message to an API server. `seconds`, `dropped`: see HEADER_DTYPE."""
    header = np.array((sum(map(len, tokens)), sum(map(len, totals)), seconds, dropped), dtype=HEADER_DTYPE)
    return b"".join(part.tobytes() for part in (header, *tokens, *totals))


def unpack(message: bytes) -> tuple[StructuredArray, StructuredArray, np.void]:
    """Return (tokens, totals, header) of a message."""
    header: np.void = np.frombuffer(message, HEADER_DTYPE, count=1)[0]
    tokens: StructuredArray = np.frombuffer(message, TOKEN_DTYPE, count=header["tokens"], offset=HEADER_DTYPE.itemsize)
    totals: StructuredArray = np.frombuffer(
        message, TOTALS_DTYPE, count=header["totals"], offset=HEADER_DTYPE.itemsize + tokens.nbytes
    )
    return tokens, totals, header
