"""The transform on the CPU, compiled by Numba: it counts a row's distinct values and takes the steps on these alone.

A model's logits are bfloat16 cast to float32, so a row of 151,936 logits holds about 3,000 distinct values. Where a
logit moves depends only on its value and on sums over the row, so each value is computed once: docs/the-transform.md.
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

from em_sampler.params import CUT
from em_sampler.transforms import batch, torch_threads
from em_sampler.transforms.batch import ROUNDING, STATS, BatchParams, Column, Method, TransformOutput
from em_sampler.transforms.reference import BETA1, BETA2, EPSILON

Floats = NDArray[np.float32]
Codes = NDArray[np.uint32]
Ints = NDArray[np.int32]

F, INT = np.float32, np.int32  # Numba widens the result of an operation unless both sides have the array's type

# As plain integers: Numba indexes no array with an enum.
OFF, EM_INF, ADAPTIVE_TEMPERATURE = Method.OFF.value, Method.EM_INF.value, Method.ADAPTIVE_TEMPERATURE.value
P_LESS, TOP_H, TOP_N_SIGMA = Method.P_LESS.value, Method.TOP_H.value, Method.TOP_N_SIGMA.value
METHOD, THRESHOLD, STEPS = Column.METHOD.value, Column.THRESHOLD.value, Column.STEPS.value
LEARNING_RATE, KL_WEIGHT, ADAM = Column.LEARNING_RATE.value, Column.KL_WEIGHT.value, Column.ADAM.value
RATIO, MIN_TEMPERATURE = Column.RATIO.value, Column.MIN_TEMPERATURE.value
MAX_TEMPERATURE = Column.MAX_TEMPERATURE.value
TEMPERATURE, NORMALIZED = Column.TEMPERATURE.value, Column.NORMALIZED.value
ALPHA, N, P_MAX, WANTS_STATS = Column.ALPHA.value, Column.N.value, Column.P_MAX.value, Column.STATS.value

# The rows of `Workspace.work`, each with one number per distinct value of a row of logits: the value less the row's
# peak, how many logits have it, how far it moved, its exponential, Adam's two moments, its probability at first.
WORK_ROWS = 7
VALUE, COUNT, MOVE, EXP, MOMENT1, MOMENT2, P0 = range(WORK_ROWS)
SCALED = MOVE  # top_h moves nothing; it needs the values over the temperature
HIGHEST = MOMENT1  # before Adam starts: the highest logit of each BLOCK of the row

BFLOAT16_SHIFT = np.uint32(16)  # a bfloat16 is the upper half of a float32; the upper half is the logit's bin
BINS = 65_536
SKIPPED_BINS = 64  # empty bins that are skipped together
MIN_HISTOGRAM_VOCAB = 4097  # shorter rows skip the histogram: scanning 65,536 bins would cost more
MAX_OFF_GRID_SHARE = 1 / 8  # a row with a larger share of logits that bfloat16 cannot represent skips it too
CUTOFF_NATS = 40.0  # a value further below the peak neither moves nor counts, at temperature 1
MIN_EXP_ARGUMENT = F(-87.0)  # of exp32; everything below counts as this
ENTROPY_NOISE = 1.5e-36  # nats per logit: what logits at MIN_EXP_ARGUMENT seem to add to the entropy
MASKED_LOGIT = F(batch.MASKED_LOGIT)
INFINITY_BITS, MINUS_INFINITY_BITS, NAN_BITS = INT(0x7F800000), INT(-0x800000), INT(0x7FC00000)  # of float32
SUM_BLOCK = 2048  # values summed in float32 before float64 takes over
MIN_PARALLEL_LOGITS = 2**18  # in a batch; with fewer, waking the threads takes longer than the work

BLOCK = 256  # logits that are left out or removed together, if none of them is kept
GATHERED_NATS = tuple(range(8, 40, 2))  # top_h looks so far below the peak, one after the other
MIN_GATHERED = 1024  # logits; at most this many, or an eighth of the row, are worth listing

TEMPERATURE_TOLERANCE = 1e-6  # relative
MAX_TRIALS = 60  # of temperatures; bisection alone needs 24


def compiled(*, fuse: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that compiles a function with Numba and keeps the machine code on disk if it can.

    Sums may be reordered into vectors. Only `exp32` may fuse a product into a sum (`fuse`): elsewhere p - p0 must be
    exactly 0 until something has moved.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    options["fastmath"] = {"nnan", "nsz", "arcp", "reassoc"} | ({"contract"} if fuse else set())

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(cache=True, **options)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # neither the source's folder nor the user's cache can be written, as in some containers
            return njit(**options)(function)  # type: ignore[no-any-return]

    return decorate


class Workspace(NamedTuple):
    """The memory of one thread."""

    counts: Ints  # [BINS], all zero between rows
    table: Floats  # [BINS], a bin's logit: before the steps, then after them
    work: Floats  # [WORK_ROWS, vocab]
    source: Ints  # [vocab], where each distinct value comes from: see `_fill_histogram`


class Sums(NamedTuple):
    """Sums over a row's logits, with y = (z - peak) / temperature and e = exp(y)."""

    total: float  # of e
    moment: float  # of e * y
    square: float  # of e * y * y
    squares: float  # of e * e


class NumbaTransform:
    """The implementation for the CPU. Building it compiles the code, or loads it from disk.

    The rows of a large batch are divided among torch's threads, as many as torch uses when this is built.
    """

    name = "numba_cpu"

    def __init__(self, vocab_size: int) -> None:
        self.threads = torch.get_num_threads()
        self.workspaces = tuple(
            Workspace(
                np.zeros(BINS, dtype=np.int32),
                np.zeros(BINS, dtype=np.float32),
                np.zeros((WORK_ROWS, vocab_size), dtype=np.float32),
                np.zeros(vocab_size, dtype=np.int32),
            )
            for _ in range(self.threads)
        )
        self(torch.zeros(1, vocab_size), BatchParams.of([None]))

    def __call__(self, logits: Tensor, params: BatchParams) -> TransformOutput:
        """Transform `logits` [rows, vocab] float32 in place, row i by row i of `params`."""
        rows, vocab = logits.shape
        stats = np.empty((STATS, rows), dtype=np.int32)
        # A torch operation costs as much as a row of a small model: only batches that need `as_strided` pay for it.
        flat = logits if logits.is_contiguous() else logits.as_strided(((rows - 1) * logits.stride(0) + vocab,), (1,))
        arguments = flat.detach().numpy().reshape(-1), logits.stride(0), params.values.numpy(), stats
        if rows * vocab < MIN_PARALLEL_LOGITS:
            _transform_rows(0, 1, *arguments, *self.workspaces[0])
        else:
            threads = min(self.threads, rows)
            torch_threads.run_all(
                partial(_transform_rows, k, threads, *arguments, *self.workspaces[k]) for k in range(threads)
            )
        return TransformOutput(logits, torch.from_numpy(stats))


@compiled()
def _transform_rows(
    first: int,
    step: int,
    flat: Floats,
    row_stride: int,
    params: Floats,
    stats: Ints,
    counts: Ints,
    table: Floats,
    work: Floats,
    source: Ints,
) -> None:
    """Transform every `step`-th row, beginning with `first`.

    Row i begins at flat[i * row_stride]. `params` is `BatchParams.values`, `stats` is `TransformOutput.stats`; the last
    four arguments are a `Workspace`.
    """
    vocab, entropies, steps = work.shape[1], stats.view(np.float32), stats[3]
    for i in range(first, len(params), step):
        z, p = flat[i * row_stride : i * row_stride + vocab], params[i]
        stats[0, i] = stats[1, i] = stats[2, i] = NAN_BITS
        steps[i] = 0
        if p[METHOD] == OFF:
            continue
        peak, on_grid, usable = _scan(z, work[HIGHEST])
        if not usable:
            continue
        if p[WANTS_STATS] or (p[METHOD] == P_LESS and p[TEMPERATURE] == 1):
            sums = _all_sums(z, peak, F(1))
            if p[WANTS_STATS]:
                entropies[2, i] = max(sums.square / sums.total - (sums.moment / sums.total) ** 2, 0.0)
        else:
            sums = _sums(z, peak)
        h = _entropy(sums, len(z))
        entropies[0, i] = entropies[1, i] = h
        if p[METHOD] == EM_INF and h >= p[THRESHOLD] and p[STEPS] > 0:
            n, counted = _fill_histogram(z, peak, on_grid, CUTOFF_NATS, counts, table, work, source)
            entropies[1, i], steps[i] = _descend(work, n, p)
            if counted:
                _write_back(z, work[VALUE, :n], work[MOVE, :n], table, source)
            else:
                _add_moves(z, work[MOVE])
        elif p[METHOD] == ADAPTIVE_TEMPERATURE and h > p[THRESHOLD]:
            cutoff = -MIN_EXP_ARGUMENT * max(p[MAX_TEMPERATURE], F(1))
            n, _ = _fill_histogram(z, peak, on_grid, cutoff, counts, table, work, source)
            t, entropies[1, i] = _temperature(work[VALUE, :n], work[COUNT, :n], h, p)
            steps[i] = 1
            _divide(z, F(t))
        elif p[METHOD] >= P_LESS:
            if p[METHOD] == TOP_H:
                lowest = _top_h(z, peak, on_grid, sums, p, counts, table, work, source)
            else:
                lowest = _lowest_kept(z, peak, sums, p)
            if lowest > -np.inf:
                steps[i], entropies[1, i] = _cut(z, F(peak), F(min(lowest, 0.0)), h, work[HIGHEST])


@compiled()
def _scan(z: Floats, highest: Floats) -> tuple[float, bool, bool]:
    """Return (the maximum, whether bfloat16 can represent every logit, whether the row is usable).

    A row with NaN or +inf, or with nothing but -inf, is not usable. All in integers: the compiler may assume that
    floats are finite. The maximum of each block of BLOCK logits is left in `highest`.
    """
    bits, highest_bits = z.view(np.int32), highest.view(np.int32)
    low, top, bottom, size = INT(0), INT(-(2**31)), INT(2**31 - 1), INT(0)
    for start in range(0, len(bits), BLOCK):
        block = bits[start : start + BLOCK]
        block_top, block_bottom = INT(-(2**31)), INT(2**31 - 1)
        for k in range(len(block)):
            b = block[k]
            low |= b
            block_top, block_bottom = max(block_top, b), min(block_bottom, b)
            size = max(size, INT(b & INT(0x7FFFFFFF)))
        # As integers, negative floats are in descending order.
        highest_bits[start // BLOCK] = block_top if block_top >= 0 else block_bottom
        top, bottom = max(top, block_top), min(bottom, block_bottom)
    top = top if top >= 0 else bottom
    usable = size <= INFINITY_BITS and INT(top & INT(0x7FFFFFFF)) != INFINITY_BITS
    return float(INT(top).view(np.float32)), (low & INT(0xFFFF)) == 0, usable


@compiled(fuse=True)
def exp32(x: Any) -> Any:
    """Return e^x in float32, to 1e-7 relative, for x from MIN_EXP_ARGUMENT to -MIN_EXP_ARGUMENT."""
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


@compiled(fuse=True)
def _sums(z: Floats, peak: float) -> Sums:
    """Return a row's sums at temperature 1, but for the last two."""
    total, moment = 0.0, 0.0
    for start in range(0, len(z), SUM_BLOCK):
        block = z[start : start + SUM_BLOCK]
        s, sy = F(0), F(0)
        for k in range(len(block)):
            y = max(block[k] - F(peak), MIN_EXP_ARGUMENT)
            e = exp32(y)
            s += e
            sy += e * y
        total += s
        moment += sy
    return Sums(total, moment, 0.0, 0.0)


@compiled(fuse=True)
def _all_sums(z: Floats, peak: float, cold: Any) -> Sums:
    """Return a row's sums at temperature 1 / cold."""
    total, moment, square, squares = 0.0, 0.0, 0.0, 0.0
    for start in range(0, len(z), SUM_BLOCK):
        block = z[start : start + SUM_BLOCK]
        s, sy, syy, ss = F(0), F(0), F(0), F(0)
        for k in range(len(block)):
            y = max((block[k] - F(peak)) * cold, MIN_EXP_ARGUMENT)
            e = exp32(y)
            s += e
            sy += e * y
            syy += e * y * y
            ss += e * e
        total += s
        moment += sy
        square += syy
        squares += ss
    return Sums(total, moment, square, squares)


@compiled()
def _entropy(sums: Sums, vocab: int) -> float:
    """Return the entropy in nats of a row with such sums."""
    h = math.log(sums.total) - sums.moment / sums.total
    return h if h > vocab * ENTROPY_NOISE else 0.0


@compiled()
def _fill_histogram(
    z: Floats, peak: float, on_grid: bool, cutoff: float, counts: Ints, table: Floats, work: Floats, source: Ints
) -> tuple[int, bool]:
    """Fill work[VALUE] and work[COUNT] with the row's distinct values; return (their number, whether it counted them).

    source[j] is the bin of value j, or -1 - k if value j is logit k alone, which bfloat16 cannot represent; such values
    come first. A row with many of these, or with few logits, is not counted: value k is logit k. `table` then holds the
    logit of each bin. Bins further than `cutoff` nats below the peak are left out.
    """
    codes, n = z.view(np.uint32), 0
    if len(z) < MIN_HISTOGRAM_VOCAB:
        n = len(z)
    elif on_grid:
        for k in range(len(codes)):
            counts[codes[k] >> BFLOAT16_SHIFT] += INT(1)
    else:
        n = _count_on_grid(codes, counts, source)
    if n > int(len(z) * MAX_OFF_GRID_SHARE):
        if len(z) >= MIN_HISTOGRAM_VOCAB:
            counts[:] = INT(0)
        for k in range(len(z)):
            work[VALUE, k], work[COUNT, k] = max(z[k] - F(peak), MASKED_LOGIT), F(1)
        return len(z), False
    for j in range(n):
        work[VALUE, j], work[COUNT, j] = max(z[-1 - source[j]] - F(peak), MASKED_LOGIT), F(1)
    return _collect_bins(F(peak), F(cutoff), n, counts, table, work, source), True


@compiled()
def _count_on_grid(codes: Codes, counts: Ints, source: Ints) -> int:
    """Count the logits that bfloat16 can represent, list the others in `source` and return the number of the others.

    Stops when there are more of the others than a histogram is worth.
    """
    n, limit = 0, int(len(codes) * MAX_OFF_GRID_SHARE)
    for k in range(len(codes)):
        if codes[k] & np.uint32(0xFFFF) == 0:
            counts[codes[k] >> BFLOAT16_SHIFT] += INT(1)
            continue
        source[n] = -1 - k
        n += 1
        if n > limit:
            break
    return n


@compiled()
def _collect_bins(peak: Any, cutoff: Any, n: int, counts: Ints, table: Floats, work: Floats, source: Ints) -> int:
    """Append the bins of `counts`, down to `cutoff` below the peak, to the n values in `work`, and clear `counts`.

    Returns the number of values in `work` then.
    """
    bits = table.view(np.uint32)
    for start in range(0, BINS, SKIPPED_BINS):
        some = INT(0)
        for code in range(start, start + SKIPPED_BINS):
            some |= counts[code]
        if some == 0:
            continue
        for code in range(start, start + SKIPPED_BINS):
            if counts[code] == 0:
                continue
            bits[code] = np.uint32(code) << BFLOAT16_SHIFT
            if table[code] - peak > -cutoff:
                work[VALUE, n], work[COUNT, n], source[n] = table[code] - peak, F(counts[code]), code
                n += 1
            counts[code] = INT(0)
    return n


@compiled()
def _descend(work: Floats, n: int, params: Floats) -> tuple[float, int]:
    """Apply EM-INF to the n values in `work` and leave in work[MOVE] how far each one moved.

    Returns their entropy in nats and the steps taken.
    """
    # Each row is sliced by itself: only such slices are contiguous to Numba, and it vectorises only contiguous arrays.
    x, w, moved = work[VALUE, :n], work[COUNT, :n], work[MOVE, :n]
    e, m, v, p0 = work[EXP, :n], work[MOMENT1, :n], work[MOMENT2, :n], work[P0, :n]
    threshold, steps, rate, kl = params[THRESHOLD], params[STEPS], params[LEARNING_RATE], params[KL_WEIGHT]
    # e is exp(x - top). `top` is where the peak's value has moved. As it is one of the values, x - center is exactly 0
    # if all values are equal. No step moves a value so far above it that e could overflow.
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
            _adam_step(x, e, m, v, p0, share, center, kl, scale, bias)
        else:
            _sgd_step(x, e, p0, share, center, kl, rate)
        top = x[peak]
        total, mean = _exponentials(x, w, e, top)
        h = max(math.log(total) - mean, 0.0)
    for k in range(n):
        moved[k] = x[k] - moved[k]
    return h, taken


@compiled()
def _exponentials(x: Floats, w: Floats, e: Floats, top: Any) -> tuple[float, float]:
    """Fill e = exp(x - top); return (the sum of w * e, the mean of x - top under the probabilities w * e)."""
    total, mean = 0.0, 0.0
    for start in range(0, len(x), SUM_BLOCK):
        xs, ws, es = x[start : start + SUM_BLOCK], w[start : start + SUM_BLOCK], e[start : start + SUM_BLOCK]
        s, sx = F(0), F(0)
        for k in range(len(xs)):
            below = max(xs[k] - top, MIN_EXP_ARGUMENT)
            es[k] = exp32(below)
            weight = es[k] * ws[k]
            s += weight
            sx += weight * below
        total += s
        mean += sx
    return total, mean / total


@compiled()
def _adam_step(
    x: Floats, e: Floats, m: Floats, v: Floats, p0: Floats, share: Any, center: Any, kl: Any, scale: Any, bias: Any
) -> None:
    """Take one step of Adam. log p + H equals x - E_p[x] = x - center: no logarithm, and exactly 0 on a uniform row."""
    for k in range(len(x)):
        p = e[k] * share
        g = kl * (p - p0[k]) - p * (x[k] - center)
        first = F(BETA1) * m[k] + F(1 - BETA1) * g
        second = F(BETA2) * v[k] + F(1 - BETA2) * (g * g)
        m[k], v[k] = first, second
        x[k] -= scale * first / (np.sqrt(second) * bias + F(EPSILON))


@compiled()
def _sgd_step(x: Floats, e: Floats, p0: Floats, share: Any, center: Any, kl: Any, rate: Any) -> None:
    """Take one plain gradient step: as `_adam_step`, without moments."""
    for k in range(len(x)):
        p = e[k] * share
        x[k] -= rate * (kl * (p - p0[k]) - p * (x[k] - center))


@compiled()
def _write_back(z: Floats, x: Floats, moved: Floats, table: Floats, source: Ints) -> None:
    """Move every logit of a counted row as far as its value moved. Overwrites x."""
    codes, off_grid = z.view(np.uint32), 0
    for j in range(len(x)):
        if source[j] >= 0:
            table[source[j]] += moved[j]
        else:
            x[j] = z[-1 - source[j]] + moved[j]
            off_grid = j + 1
    for k in range(len(z)):
        z[k] = table[codes[k] >> BFLOAT16_SHIFT]
    for j in range(off_grid):
        z[-1 - source[j]] = x[j]


@compiled()
def _add_moves(z: Floats, moved: Floats) -> None:
    for k in range(len(z)):
        z[k] += moved[k]


@compiled()
def _divide(z: Floats, t: Any) -> None:
    for k in range(len(z)):
        z[k] /= t


@compiled()
def _temperature(x: Floats, w: Floats, h: float, params: Floats) -> tuple[float, float]:
    """Return (the largest temperature whose entropy does not exceed the target, the entropy there).

    Takes Newton's steps on log T, with dH / d log T = Var_p[x / T], and bisects if a step would leave the bracket.
    """
    target = max(params[RATIO] * h, params[THRESHOLD])
    low, high = math.log(params[MIN_TEMPERATURE]), math.log(params[MAX_TEMPERATURE])
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
    """Return (entropy in nats at temperature exp(log_t), its derivative with respect to log_t)."""
    cold = F(math.exp(-log_t))
    total, mean, square = 0.0, 0.0, 0.0
    for start in range(0, len(x), SUM_BLOCK):
        xs, ws = x[start : start + SUM_BLOCK], w[start : start + SUM_BLOCK]
        s, sx, sxx = F(0), F(0), F(0)
        for k in range(len(xs)):
            y = max(xs[k] * cold, MIN_EXP_ARGUMENT)
            weight = exp32(y) * ws[k]
            s += weight
            sx += weight * y
            sxx += weight * y * y
        total += s
        mean += sx
        square += sxx
    mean /= total
    return max(math.log(total) - mean, 0.0), square / total - mean * mean


@compiled()
def _lowest_kept(z: Floats, peak: float, sums: Sums, params: Floats) -> float:
    """Return how far below the peak (a number up to 0) a row's method, any but top_h, keeps tokens; -inf for all.

    `sums`: `_sums` at temperature 1.
    """
    if params[METHOD] == TOP_N_SIGMA:
        return -float(params[N]) * float(_deviation(z, peak))
    temperature = float(params[TEMPERATURE])
    if temperature != 1:
        sums = _all_sums(z, peak, F(1 / temperature))
    total = sums.total
    if params[METHOD] == P_LESS:
        bound = sums.squares / (total * total)
        if params[NORMALIZED]:
            n = _count_finite(z)
            bound = (n * bound - 1) / max(n - 1, 1)
        # Lower by float32's rounding, so that tokens whose probability is the bound stay.
        return temperature * (math.log(bound * total) - ROUNDING) if bound > 0 else -np.inf
    return 0.0 if 1 / total < params[P_MAX] else -np.inf


@compiled()
def _deviation(z: Floats, peak: float) -> float:
    """Return the standard deviation of the finite logits.

    In float64, in one pass, around the peak: as it is one of n logits, it lies within sqrt(n) deviations of the mean,
    and the difference below keeps its digits.
    """
    n, total, square = 0.0, 0.0, 0.0
    for k in range(len(z)):
        x = float(z[k]) - peak if z[k] > -np.inf else 0.0
        n += 1.0 if z[k] > -np.inf else 0.0
        total += x
        square += x * x
    return math.sqrt(max(square / n - (total / n) ** 2, 0.0))


@compiled()
def _count_finite(z: Floats) -> int:
    n, bits = 0, z.view(np.int32)
    for k in range(len(z)):
        n += bits[k] != MINUS_INFINITY_BITS
    return n


@compiled()
def _cut(z: Floats, peak: Any, lowest: Any, h: float, highest: Floats) -> tuple[int, float]:
    """Remove the logits further below the peak than `lowest`; return (CUT if there were any, else 0; the entropy)."""
    total, mean, cut = 0.0, 0.0, False
    for start in range(0, len(z), BLOCK):
        block, top = z[start : start + BLOCK], highest[start // BLOCK]
        if top - peak < lowest:
            cut |= top > -np.inf
            block[:] = -np.inf
            continue
        for k in range(len(block)):
            x = block[k] - peak
            if x >= lowest:
                e = exp32(max(x, MIN_EXP_ARGUMENT))
                total += e
                mean += e * max(x, MIN_EXP_ARGUMENT)
            else:
                cut |= x > -np.inf
                block[k] = -np.inf
    return (CUT, max(math.log(total) - mean / total, 0.0)) if cut else (0, h)


@compiled()
def _top_h(
    z: Floats,
    peak: float,
    on_grid: bool,
    sums: Sums,
    params: Floats,
    counts: Ints,
    table: Floats,
    work: Floats,
    source: Ints,
) -> float:
    """Return how far below the peak top_h keeps tokens: the lowest of the longest prefix with entropy alpha * H.

    `sums`: `_sums` at temperature 1.
    """
    if params[ALPHA] == 1:
        return -np.inf  # all tokens have the entropy itself, which sums in another order may miss
    cold = 1 / float(params[TEMPERATURE])
    if cold != 1:
        sums = _all_sums(z, peak, F(cold))
    limit = params[ALPHA] * _entropy(sums, len(z)) * (1 + ROUNDING)
    for nats in GATHERED_NATS:
        n = _gather(z, F(peak), F(-nats / cold), work)
        if n == 0:
            break
        if _weigh(work, n, cold) > limit:
            return float(_lowest_of_prefix(work, n, limit))
        if on_grid:
            break  # counting the row costs less than another look
    cutoff = -MIN_EXP_ARGUMENT * max(params[TEMPERATURE], F(1))
    n, _ = _fill_histogram(z, peak, on_grid, cutoff, counts, table, work, source)
    return _lowest_of_prefix(work, n, limit) if _weigh(work, n, cold) > limit else -np.inf


@compiled()
def _gather(z: Floats, peak: Any, lowest: Any, work: Floats) -> int:
    """List the logits down to `lowest` below the peak as the values in `work`; return their number, 0 if too many."""
    n, x, most = 0, work[VALUE], max(MIN_GATHERED, len(z) // 8)
    for start in range(0, len(z), BLOCK):
        block = z[start : start + BLOCK]
        if work[HIGHEST, start // BLOCK] - peak < lowest:
            continue
        if n + len(block) > most:
            return 0
        for k in range(len(block)):  # without a branch, which would often be mispredicted
            x[n] = block[k] - peak
            n += INT(x[n] >= lowest)
    work[COUNT, :n] = F(1)
    return n


@compiled()
def _weigh(work: Floats, n: int, cold: float) -> float:
    """Fill work[SCALED] with the values times `cold`, work[EXP] with their weights; return their entropy in nats."""
    x, w, y, e = work[VALUE, :n], work[COUNT, :n], work[SCALED, :n], work[EXP, :n]
    total, mean = 0.0, 0.0
    for k in range(n):
        y[k] = max(x[k] * F(cold), MIN_EXP_ARGUMENT)
        e[k] = exp32(y[k]) * w[k]
        total += e[k]
        mean += e[k] * y[k]
    return math.log(total) - mean / total


@compiled()
def _lowest_of_prefix(work: Floats, n: int, limit: float) -> float:
    """Return the lowest of the highest values in `work`, as many as have at most `limit` nats of entropy together.

    If one of several equal values is among them, all are. The range that holds the answer is halved: the values above
    the middle either all belong to the prefix, or the answer is one of them.
    """
    x, w, y, e = work[VALUE, :n], work[COUNT, :n], work[SCALED, :n], work[EXP, :n]
    first, total, moment, answer = 0, 0.0, 0.0, 0.0  # the candidates are from `first` to n; sums over those above them
    while first < n:
        low, high = x[first], x[first]
        for k in range(first, n):
            low, high = min(low, x[k]), max(high, x[k])
        middle = low + (high - low) / F(2)
        middle = middle if middle > low else high
        upper = first  # the candidates from `middle` up are moved before it
        lowest, one, at = high, 0.0, 0.0
        sum_upper, moment_upper = 0.0, 0.0
        for k in range(first, n):
            if x[k] >= middle:
                x[k], x[upper] = x[upper], x[k]
                w[k], w[upper] = w[upper], w[k]
                y[k], y[upper] = y[upper], y[k]
                e[k], e[upper] = e[upper], e[k]
                sum_upper += e[upper]
                moment_upper += e[upper] * y[upper]
                if x[upper] <= lowest:
                    lowest, one, at = x[upper], e[upper] / w[upper], y[upper]
                upper += 1
        sum_lowest, kept = 0.0, first  # those above the lowest of these are moved before `kept`
        for k in range(first, upper):
            if x[k] == lowest:
                sum_lowest += e[k]
            else:
                x[k], x[kept] = x[kept], x[k]
                w[k], w[kept] = w[kept], w[k]
                y[k], y[kept] = y[kept], y[k]
                e[k], e[kept] = e[kept], e[k]
                kept += 1
        s = total + sum_upper - sum_lowest + one
        m = moment + moment_upper - (sum_lowest - one) * at
        if math.log(s) - m / s <= limit:
            first, answer = upper, lowest
            total, moment = total + sum_upper, moment + moment_upper
        else:
            n = kept
    return answer
