"""The transform on the CPU, compiled by Numba: a row is counted once, and the work is done on its distinct values.

An engine's logits are bfloat16 cast to float32, so that a row of 151,936 holds about 3,000 values. What the transform
makes of a logit depends on its value and on sums over the row, so each value is worked out once: docs/the-transform.md.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from em_sampler.transforms import torch_threads
from em_sampler.transforms.batch import ADAPTIVE, EM_INF, NO_METHOD, PARAM_COLUMNS, BatchParams, TransformOutput
from em_sampler.transforms.reference import BETA1, BETA2, EPSILON

Floats = NDArray[np.float32]
Codes = NDArray[np.uint32]
Ints = NDArray[np.int32]

F, INT = np.float32, np.int32  # an array's type has to be said in every operation, or Numba makes it wider
METHOD, THRESHOLD, STEPS, RATE, KL, ADAM, RATIO, MIN_T, MAX_T = range(len(PARAM_COLUMNS))

HALF = np.uint32(16)  # a bfloat16 is the upper half of a float32; its 65,536 codes are the slots of the count
CODES = 65_536
MIN_HISTOGRAM_VOCAB = (
    4096  # a row of no more logits is not counted: each logit is its own value, and the codes need no looking through
)
MAX_OFF_GRID_SHARE = 8  # nor is one with more than 1 / MANY of its values off bfloat16's grid
REACH = 40.0  # nats below the peak under which a value neither moves nor counts, at temperature 1
SMALLEST = F(-87.0)  # argument of exp32; the value of all that lies below it
LEAST = 1.5e-36  # nats of entropy for each logit: what logits at SMALLEST may seem to add
NOTHING = F(-1e6)  # stands in for -inf, so that no sum holds 0 * inf
INFINITY, NAN = INT(0x7F800000), INT(0x7FC00000)  # a float32's bits
BLOCK = 2048  # values summed in float32 before float64 takes over
WORTH_THREADS = 2**18  # logits in a batch, under which waking the threads takes longer than the work
STRIDE = 64  # codes that are skipped together where a count is empty

TEMPERATURE_TOLERANCE = 1e-6  # relative
MAX_TRIALS = 60  # of temperatures; bisection alone needs 24


def compiled(*, fuse: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Numba's compilation, kept on disk where there is a place for it.

    Sums may be reordered into vectors. Products are fused into sums only in `exp32`: elsewhere p - p0 has to be 0
    where it is.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    options["fastmath"] = {"nnan", "nsz", "arcp", "reassoc"} | ({"contract"} if fuse else set())

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(cache=True, **options)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # neither beside the source nor in the user's cache: as in some containers
            return njit(**options)(function)  # type: ignore[no-any-return]

    return decorate


class Workspace(NamedTuple):
    """What one thread works in."""

    counts: Ints  # [CODES], all zero between rows
    table: Floats  # [CODES], new logit by code
    work: Floats  # [7, vocab], see `_distinct` and `_descend`
    where: Ints  # [vocab]


class NumbaTransform:
    """`transform` for an engine that calls it at every step. Compiles when it is made, or loads what it compiled.

    Rows are shared out among as many of torch's threads as torch uses when it is made.
    """

    def __init__(self, vocab_size: int) -> None:
        self.threads = torch.get_num_threads()
        self.workspaces = tuple(
            Workspace(
                np.zeros(CODES, dtype=np.int32),
                np.zeros(CODES, dtype=np.float32),
                np.zeros((7, vocab_size), dtype=np.float32),
                np.zeros(vocab_size, dtype=np.int32),
            )
            for _ in range(self.threads)
        )
        self(torch.zeros(1, vocab_size), BatchParams.of([None]))

    def __call__(self, logits: Tensor, params: BatchParams) -> TransformOutput:
        """Transform `logits` [rows, vocab] float32 in place, row i by row i of `params`."""
        rows, vocab = logits.shape
        statistics = np.empty((3, rows), dtype=np.int32)
        # Every operation of torch costs as much as a row of a small model: that of strides is for the few who need it.
        flat = logits if logits.is_contiguous() else logits.as_strided(((rows - 1) * logits.stride(0) + vocab,), (1,))
        batch = flat.detach().numpy().reshape(-1), logits.stride(0), params.values.numpy(), statistics
        if rows * vocab < WORTH_THREADS:
            _transform(0, 1, *batch, *self.workspaces[0])
        else:
            threads = min(self.threads, rows)
            torch_threads.run_all(partial(_transform, k, threads, *batch, *self.workspaces[k]) for k in range(threads))
        return TransformOutput(logits, torch.from_numpy(statistics))


@compiled()
def _transform(
    first: int,
    every: int,
    span: Floats,
    stride: int,
    params: Floats,
    statistics: Ints,
    counts: Ints,
    table: Floats,
    work: Floats,
    where: Ints,
) -> None:
    vocab, entropies, steps = work.shape[1], statistics.view(np.float32), statistics[2]
    for i in range(first, len(params), every):
        z, p = span[i * stride : i * stride + vocab], params[i]
        statistics[0, i] = statistics[1, i] = NAN
        steps[i] = 0
        if p[METHOD] == NO_METHOD:
            continue
        peak, on_grid, usable = _scan(z)
        if not usable:
            continue
        h = _entropy(z, peak)
        entropies[0, i] = entropies[1, i] = h
        if p[METHOD] == EM_INF and h >= p[THRESHOLD] and p[STEPS] > 0:
            n, counted = _distinct(z, peak, on_grid, REACH, counts, table, work, where)
            entropies[1, i], steps[i] = _descend(work, n, p)
            if counted:
                _write(z, work[0, :n], work[2, :n], table, where)
            else:
                _add(z, work[2])
        elif p[METHOD] == ADAPTIVE and h > p[THRESHOLD]:
            reach = -SMALLEST * max(p[MAX_T], F(1))
            n, _ = _distinct(z, peak, on_grid, reach, counts, table, work, where)
            t, entropies[1, i] = _temperature(work[0, :n], work[1, :n], h, p)
            steps[i] = 1
            _divide(z, F(t))


@compiled()
def _scan(z: Floats) -> tuple[float, bool, bool]:
    """(the row's maximum, whether all of it is on bfloat16's grid, False where it has NaN or +inf or only -inf).

    In integers, because the compiler may take floats for finite.
    """
    bits = z.view(np.int32)
    low, top, size = INT(0), INT(-(2**31)), INT(0)
    for k in range(len(bits)):
        b = bits[k]
        low |= b
        top = max(top, INT(b ^ INT(INT(b >> INT(31)) & INT(0x7FFFFFFF))))  # ordered as the floats are
        size = max(size, INT(b & INT(0x7FFFFFFF)))
    top ^= INT(INT(top >> INT(31)) & INT(0x7FFFFFFF))
    usable = size <= INFINITY and INT(top & INT(0x7FFFFFFF)) != INFINITY
    return float(INT(top).view(np.float32)), (low & INT(0xFFFF)) == 0, usable


@compiled(fuse=True)
def exp32(x: Any) -> Any:
    """e^x in float32, to 1e-7 relative, for x from SMALLEST up to as far above 0."""
    k = np.floor(x * F(1.4426950408889634) + F(0.5))
    r = x - k * F(0.693359375) + k * F(2.12194440e-4)  # ln 2 in two parts
    p = F(1.98756915e-4)  # a minimax polynomial of (e^r - 1 - r) / r^2 on |r| < ln 2 / 2
    p = p * r + F(1.3981999507e-3)
    p = p * r + F(8.3334519073e-3)
    p = p * r + F(4.1665795894e-2)
    p = p * r + F(1.6666665459e-1)
    p = p * r + F(5.0000001201e-1)
    power = INT(INT(INT(k) + INT(127)) << INT(23)).view(np.float32)
    return (p * r * r + r + F(1.0)) * power


@compiled()
def _entropy(z: Floats, peak: float) -> float:
    """Entropy in nats of softmax(z)."""
    total, mean = 0.0, 0.0
    for start in range(0, len(z), BLOCK):
        block = z[start : start + BLOCK]
        s, sx = F(0), F(0)
        for k in range(len(block)):
            x = max(block[k] - F(peak), SMALLEST)
            e = exp32(x)
            s += e
            sx += e * x
        total += s
        mean += sx
    h = math.log(total) - mean / total
    return h if h > len(z) * LEAST else 0.0


@compiled()
def _distinct(
    z: Floats, peak: float, on_grid: bool, reach: float, counts: Ints, table: Floats, work: Floats, where: Ints
) -> tuple[int, bool]:
    """The row's values, less its peak, into work[0], and how often each occurs into work[1]: (how many, counted).

    where[j] says what value j is: a code of bfloat16, or -1 - k for logit k, off the grid; these come first. A row that
    has many of them, or few logits, is not counted: value k is logit k. Leaves `table` with the row's values by code.
    """
    codes, n = z.view(np.uint32), 0
    if len(z) <= MIN_HISTOGRAM_VOCAB:
        n = len(z)
    elif on_grid:
        for k in range(len(codes)):
            counts[codes[k] >> HALF] += INT(1)
    else:
        n = _count_some(codes, counts, where)
    if n > len(z) // MAX_OFF_GRID_SHARE:
        if len(z) > MIN_HISTOGRAM_VOCAB:
            counts[:] = INT(0)
        for k in range(len(z)):
            work[0, k], work[1, k] = max(z[k] - F(peak), NOTHING), F(1)
        return len(z), False
    for j in range(n):
        work[0, j], work[1, j] = max(z[-1 - where[j]] - F(peak), NOTHING), F(1)
    return _collect(F(peak), F(reach), n, counts, table, work, where), True


@compiled()
def _count_some(codes: Codes, counts: Ints, where: Ints) -> int:
    """Count the values on the grid and list the others; how many these are, or one more than can be used."""
    n = 0
    for k in range(len(codes)):
        if codes[k] & np.uint32(0xFFFF) == 0:
            counts[codes[k] >> HALF] += INT(1)
            continue
        where[n] = -1 - k
        n += 1
        if n > len(codes) // MAX_OFF_GRID_SHARE:
            break
    return n


@compiled()
def _collect(peak: Any, reach: Any, n: int, counts: Ints, table: Floats, work: Floats, where: Ints) -> int:
    """Append what `counts` holds, down to `reach` below the peak, to the n values that are there, and empty it.

    Returns how many there are then.
    """
    bits = table.view(np.uint32)
    for start in range(0, CODES, STRIDE):
        some = INT(0)
        for code in range(start, start + STRIDE):
            some |= counts[code]
        if some == 0:
            continue
        for code in range(start, start + STRIDE):
            if counts[code] == 0:
                continue
            bits[code] = np.uint32(code) << HALF
            if table[code] - peak > -reach:
                work[0, n], work[1, n], where[n] = table[code] - peak, F(counts[code]), code
                n += 1
            counts[code] = INT(0)
    return n


@compiled()
def _descend(work: Floats, n: int, params: Floats) -> tuple[float, int]:
    """EM-INF on the n values in work[0] that occur work[1] times; leaves in work[2] how far each one went.

    Returns their entropy in nats, and the steps taken.
    """
    # Slices of rows, because only these are contiguous to Numba, which makes vectors of nothing else.
    x, w, moved, e, m, v, p0 = (
        work[0, :n], work[1, :n], work[2, :n], work[3, :n], work[4, :n], work[5, :n], work[6, :n],
    )  # fmt: skip
    threshold, steps, rate, kl = params[THRESHOLD], params[STEPS], params[RATE], params[KL]
    # e is exp(x - top), where top is what has become of the peak. It is one of the values, so that c is exactly 0 where
    # they are all the same; a step moves none so far above it that e could overflow.
    top, taken, peak = F(0), 0, 0
    while x[peak] < 0:
        peak += 1
    total, mean = _exponentials(x, w, e, top)
    h = math.log(total) - mean
    moved[:] = x
    m[:] = F(0)
    v[:] = F(0)
    for k in range(n):
        p0[k] = e[k] * F(1 / total)
    while taken < steps and h >= threshold:
        taken += 1
        share, center = F(1 / total), F(top + mean)
        if params[ADAM]:
            scale, bias = F(rate / (1 - BETA1**taken)), F(1 / math.sqrt(1 - BETA2**taken))
            _adam(x, e, m, v, p0, share, center, kl, scale, bias)
        else:
            _plain(x, e, p0, share, center, kl, rate)
        top = x[peak]
        total, mean = _exponentials(x, w, e, top)
        h = max(math.log(total) - mean, 0.0)
    for k in range(n):
        moved[k] = x[k] - moved[k]
    return h, taken


@compiled()
def _exponentials(x: Floats, w: Floats, e: Floats, top: Any) -> tuple[float, float]:
    """e = exp(x - top): (their sum, weighted by w; the mean of x - top under p)."""
    total, mean = 0.0, 0.0
    for start in range(0, len(x), BLOCK):
        xs, ws, es = x[start : start + BLOCK], w[start : start + BLOCK], e[start : start + BLOCK]
        s, sx = F(0), F(0)
        for k in range(len(xs)):
            below = max(xs[k] - top, SMALLEST)
            es[k] = exp32(below)
            weight = es[k] * ws[k]
            s += weight
            sx += weight * below
        total += s
        mean += sx
    return total, mean / total


@compiled()
def _adam(
    x: Floats, e: Floats, m: Floats, v: Floats, p0: Floats, share: Any, center: Any, kl: Any, scale: Any, bias: Any
) -> None:
    """One step. With c = x - E_p[x], log p + H is c: no logarithm, and 0 on a uniform row."""
    for k in range(len(x)):
        p = e[k] * share
        g = kl * (p - p0[k]) - p * (x[k] - center)
        first = F(BETA1) * m[k] + F(1 - BETA1) * g
        second = F(BETA2) * v[k] + F(1 - BETA2) * (g * g)
        m[k], v[k] = first, second
        x[k] -= scale * first / (np.sqrt(second) * bias + F(EPSILON))


@compiled()
def _plain(x: Floats, e: Floats, p0: Floats, share: Any, center: Any, kl: Any, rate: Any) -> None:
    for k in range(len(x)):
        p = e[k] * share
        x[k] -= rate * (kl * (p - p0[k]) - p * (x[k] - center))


@compiled()
def _write(z: Floats, x: Floats, moved: Floats, table: Floats, where: Ints) -> None:
    """Move every logit of a counted row as far as its value moved."""
    codes, off_grid = z.view(np.uint32), 0
    for j in range(len(x)):
        if where[j] >= 0:
            table[where[j]] += moved[j]
        else:
            x[j] = z[-1 - where[j]] + moved[j]
            off_grid = j + 1
    for k in range(len(z)):
        z[k] = table[codes[k] >> HALF]
    for j in range(off_grid):
        z[-1 - where[j]] = x[j]


@compiled()
def _add(z: Floats, moved: Floats) -> None:
    for k in range(len(z)):
        z[k] += moved[k]


@compiled()
def _divide(z: Floats, t: Any) -> None:
    for k in range(len(z)):
        z[k] /= t


@compiled()
def _temperature(x: Floats, w: Floats, h: float, params: Floats) -> tuple[float, float]:
    """(the largest temperature at which the entropy reaches its target, the entropy there).

    Newton's steps on log T, of which the entropy's derivative is Var_p[x / T], with bisection where they would leave
    the bracket.
    """
    target = max(params[RATIO] * h, params[THRESHOLD])
    low, high = math.log(params[MIN_T]), math.log(params[MAX_T])
    hottest, _ = _entropy_at(x, w, high)
    if hottest <= target:
        return math.exp(high), hottest
    coldest, _ = _entropy_at(x, w, low)
    if coldest > target:
        return math.exp(low), coldest
    log_t = min(max(low, 0.0), high)
    for _ in range(MAX_TRIALS):
        reached, slope = _entropy_at(x, w, log_t)
        if reached <= target:
            low = log_t
        else:
            high = log_t
        step = (target - reached) / max(slope, 1e-30)
        following = log_t + step
        if not low < following < high:
            following = (low + high) / 2
        if abs(following - log_t) < TEMPERATURE_TOLERANCE:
            break
        log_t = following
    return math.exp(log_t), reached


@compiled()
def _entropy_at(x: Floats, w: Floats, log_t: float) -> tuple[float, float]:
    """(entropy in nats at temperature exp(log_t), its derivative with respect to log_t)."""
    cold = F(math.exp(-log_t))
    total, mean, square = 0.0, 0.0, 0.0
    for start in range(0, len(x), BLOCK):
        xs, ws = x[start : start + BLOCK], w[start : start + BLOCK]
        s, sx, sxx = F(0), F(0), F(0)
        for k in range(len(xs)):
            y = max(xs[k] * cold, SMALLEST)
            weight = exp32(y) * ws[k]
            s += weight
            sx += weight * y
            sxx += weight * y * y
        total += s
        mean += sx
        square += sxx
    mean /= total
    return max(math.log(total) - mean, 0.0), square / total - mean * mean
