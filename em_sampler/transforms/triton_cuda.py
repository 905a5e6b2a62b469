"""The transform on CUDA in Triton: four launches a step, whatever the rows, their parameters and the number of steps.

A row is counted on a grid that is fine where the transform is not smooth; the gradient steps run on its 4,096 cells,
with the tangent of what they do to a logit; every logit then moves by its cell's tangent: docs/the-transform.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from em_sampler.params import MAX_STEPS
from em_sampler.transforms import batch, reference
from em_sampler.transforms.batch import BatchParams, TransformOutput

C = tl.constexpr  # Triton takes no other globals
EM_INF, ADAPTIVE, NO_METHOD = C(batch.EM_INF), C(batch.ADAPTIVE), C(batch.NO_METHOD)
BETA1, BETA2, EPSILON = C(reference.BETA1), C(reference.BETA2), C(reference.EPSILON)
METHOD, THRESHOLD, STEPS, RATE, KL, ADAM, RATIO, MIN_T, MAX_T = (C(i) for i in range(len(batch.PARAM_COLUMNS)))
COLUMNS, HISTORY = C(len(batch.PARAM_COLUMNS)), C(MAX_STEPS)

CHUNK = C(4096)  # logits of one program
PARTIAL = C(5)  # numbers that a program leaves of its chunk: see `_measure`

# The grid: a cell is a sign, an octave and some bits of the distance from the row's centre. A row of EM-INF has 16
# octaves, down from its own spread, with 7 bits each. One of adaptive temperature has 32 from 2^-16 up, with 6 bits: it
# may look further.
CELLS, SIDE = C(4096), C(2048)
OCTAVES_EM_INF, FINEST, INNER_ADAPTIVE = C(16), C(-100), C(-16)
SHIFT_EM_INF, SHIFT_ADAPTIVE = C(16), C(17)  # a cell is so many of a float32's bits wide
# A count holds, in one integer, how many logits fell into a cell and the sum of their places in it, in those bits.
COUNT_SHIFT, PLACE_SUM = C(40), C((1 << 40) - 1)
REACH_EM_INF = C(25.0)  # nats below the peak under which logits do not count: 150,000 of them weigh 2e-6
SMALLEST = C(-87.0)  # argument of exp: e^-87 is nothing beside the peak's 1
LOWEST = C(-3e38)  # stands in for -inf where numbers are subtracted
CROWD = C(8)  # fewer logits in a cell are taken to be equal
ABOVE = C(0.01)  # cells higher than this above the highest logit are empty: they must not run away
STEEPEST = C(1e4)  # nor may a slope
STEEP = C(0.01)  # a cell over which the tangent changes a logit by more is not trusted with it
MOST_SPREAD = C(0.1)  # variance within a cell beyond which its second order says nothing

TEMPERATURE_TOLERANCE = C(1e-6)
MAX_TRIALS = C(60)


class TritonTransform:
    """`transform` for an engine that calls it at every step: no host synchronisation, no allocation, deterministic.

    All memory is allocated, and all code compiled, when it is made. What a call returns is overwritten by the next.
    """

    def __init__(self, vocab_size: int, device: torch.device, max_rows: int) -> None:
        self.splits, max_rows = triton.cdiv(vocab_size, CHUNK.value), max(max_rows, 1)

        def floats(*shape: int) -> Tensor:
            return torch.empty(max_rows, *shape, dtype=torch.float32, device=device)

        self.partials = floats(self.splits, PARTIAL.value)
        self.counts = torch.zeros(max_rows, CELLS.value, dtype=torch.int64, device=device)  # empty between calls
        self.tangents = torch.empty_like(self.counts)  # two float32 each: the move at x = 0, and what x adds to it
        self.history = floats(HISTORY.value, 3)
        self.statistics = torch.empty(3, max_rows, dtype=torch.int32, device=device)
        self.before, self.after = self.statistics[:2].view(torch.float32)
        self.steps = self.statistics[2]
        self(torch.zeros(1, vocab_size, device=device), BatchParams.of([None], device))

    def __call__(self, logits: Tensor, params: BatchParams) -> TransformOutput:
        """Transform `logits` [rows, vocab] float32 in place, row i by row i of `params`."""
        n, vocab = logits.shape
        if n:
            sizes = {"vocab": vocab, "splits": self.splits, "power": triton.next_power_of_2(self.splits)}
            # Not fused: p - p0 has to be exactly 0 where nothing has moved yet.
            options = sizes | {"num_warps": 16, "enable_fp_fusion": False}
            chunks, row = (logits, logits.stride(0)), (params.values, self.partials)
            _measure[self.splits, n](*chunks, *row, **options)
            _count[self.splits, n](*chunks, *row, self.counts, **options)
            entropies = (self.before, self.after)
            _solve[n,](*row, self.counts, self.tangents, self.history, *entropies, self.steps, **options)
            _move[self.splits, n](*chunks, *row, self.tangents, self.history, self.steps, **options | {"num_warps": 32})
        return TransformOutput(logits, self.statistics[:, :n])


@triton.jit
def _measure(logits, stride, params, partials, vocab: tl.constexpr, splits: tl.constexpr, power: tl.constexpr):
    """One chunk's maximum, sum and first moment of exp(z - maximum), its lowest value within reach of the maximum, and
    how many values bfloat16 does not have: more than any number where it holds NaN or +inf."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(params + row * COLUMNS + METHOD) == NO_METHOD:
        return
    at = split * CHUNK + tl.arange(0, CHUNK)
    z = tl.load(logits + row * stride + at, mask=at < vocab, other=-float("inf"))
    off_grid = ((z.to(tl.int32, bitcast=True) & 0xFFFF) != 0).to(tl.float32)
    off_grid = tl.where((z != z) | (z == float("inf")), float("inf"), off_grid)
    peak = tl.maximum(tl.max(z), LOWEST)
    below = tl.maximum(z - peak, SMALLEST)
    e = tl.where(z - peak > SMALLEST, tl.exp(below), 0.0)
    out = partials + (row * splits + split) * PARTIAL
    tl.store(out, peak)
    tl.store(out + 1, tl.sum(e))
    tl.store(out + 2, tl.sum(e * below))
    tl.store(out + 3, tl.min(tl.where(z - peak > -REACH_EM_INF, z, peak)))
    tl.store(out + 4, tl.sum(off_grid))


@triton.jit
def _row(params, partials, row, splits: tl.constexpr, power: tl.constexpr):
    """A row as a whole: (its peak, total of exp(z - peak), mean of z - peak, how far down it reaches, values off
    bfloat16's grid, entropy: NaN where it passes through, whether it is active)."""
    split = tl.arange(0, power)
    at, mask = partials + (row * splits + split) * PARTIAL, split < splits
    peaks = tl.load(at, mask=mask, other=LOWEST)
    sums = tl.load(at + 1, mask=mask, other=0.0)
    moments = tl.load(at + 2, mask=mask, other=0.0)
    lows = tl.load(at + 3, mask=mask, other=LOWEST)
    off_grid = tl.sum(tl.load(at + 4, mask=mask, other=0.0))
    peak = tl.max(peaks)
    below = tl.maximum(peaks - peak, SMALLEST)
    scale = tl.where(peaks - peak > SMALLEST, tl.exp(below), 0.0)
    total = tl.sum(sums * scale)
    mean = tl.sum((moments + sums * below) * scale) / total
    spread = tl.max(tl.where(peaks - peak > -REACH_EM_INF, tl.minimum(peak - lows, REACH_EM_INF), 0.0))
    h = tl.maximum(tl.log(total) - mean, 0.0)
    h = tl.where((off_grid == float("inf")) | (peak == LOWEST), float("nan"), h)
    p = params + row * COLUMNS
    method, threshold = tl.load(p + METHOD), tl.load(p + THRESHOLD)
    descends = (method == EM_INF) & (h >= threshold) & (tl.load(p + STEPS) > 0)
    active = descends | ((method == ADAPTIVE) & (h > threshold))
    return peak, total, mean, spread, off_grid, h, active


@triton.jit
def _grid(params, row, mean, spread):
    """A row's grid: (its centre, exponent of the innermost octave, bits of a cell, nats below the peak that count).

    EM-INF breaks at its cut, where log p + H = 0: at the mean. Adaptive temperature is decided next to the peak, and
    the hotter it may be, the further down it looks.
    """
    p = params + row * COLUMNS
    adaptive = tl.load(p + METHOD) == ADAPTIVE
    outer = (spread.to(tl.int32, bitcast=True) >> 23) - 127 + 1  # the octave above the spread
    inner = tl.where(adaptive, INNER_ADAPTIVE, tl.maximum(outer - OCTAVES_EM_INF, FINEST))
    shift = tl.where(adaptive, SHIFT_ADAPTIVE, SHIFT_EM_INF)
    hottest = tl.maximum(tl.load(p + MAX_T), 1.0)
    return tl.where(adaptive, 0.0, mean), inner, shift, tl.where(adaptive, -SMALLEST * hottest, REACH_EM_INF)


@triton.jit
def _cell(x, inner, shift):
    """(cell, place in it from 0 up to 2^shift) of the distances x from the centre."""
    bits = x.to(tl.int32, bitcast=True)
    size, low = bits & 0x7FFFFFFF, (inner + 127) << 23
    near = tl.minimum(tl.abs(x) / _power_of_2(inner), 1.0) * _power_of_2(shift)  # the innermost goes to 0
    place = tl.where(size < low, near.to(tl.int32), size) & ((1 << shift) - 1)
    cell = tl.minimum(tl.maximum(size - low, 0) >> shift, SIDE - 1)
    return tl.where(bits < 0, cell + SIDE, cell), place


@triton.jit
def _power_of_2(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _count(logits, stride, params, partials, counts, vocab: tl.constexpr, splits: tl.constexpr, power: tl.constexpr):
    """Count one chunk of an active row. Integers, so that the order in which they are added does not show."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(params + row * COLUMNS + METHOD) == NO_METHOD:
        return
    peak, _, mean, spread, _, _, active = _row(params, partials, row, splits, power)
    if not active:
        return
    at = split * CHUNK + tl.arange(0, CHUNK)
    z = tl.load(logits + row * stride + at, mask=at < vocab, other=-float("inf"))
    centre, inner, shift, reach = _grid(params, row, mean, spread)
    cell, place = _cell((z - peak) - centre, inner, shift)
    one = (tl.full([CHUNK], 1, tl.int64) << COUNT_SHIFT) + place
    tl.atomic_add(counts + row * CELLS + cell, one, mask=z - peak > -reach, sem="relaxed")


@triton.jit
def _contents(counts, row, inner, shift):
    """What was counted, which is cleared: (number, mean x, width) of each cell. An empty one has its middle."""
    k = tl.arange(0, CELLS)
    packed = tl.load(counts + row * CELLS + k)
    tl.store(counts + row * CELLS + k, tl.zeros([CELLS], tl.int64))
    n = (packed >> COUNT_SHIFT).to(tl.float32)
    place = (packed & PLACE_SUM).to(tl.float32) / tl.maximum(n, 1.0) / _power_of_2(shift)
    bits = ((inner + 127) << 23) + ((k & (SIDE - 1)) << shift)
    low, high = bits.to(tl.float32, bitcast=True), (bits + (1 << shift)).to(tl.float32, bitcast=True)
    low = tl.where((k & (SIDE - 1)) == 0, 0.0, low)
    size = low + (high - low) * tl.where(n > 0, place, 0.5)
    return n, tl.where(k < SIDE, size, -size), high - low


@triton.jit
def _variance(n, x, z, width, on_grid):
    """Of x in each cell, taking logits for evenly spread: over the values that bfloat16 has there, or over all."""
    exponent = (z.to(tl.int32, bitcast=True) >> 23) & 0xFF
    spacing = tl.where(exponent > 7, _power_of_2(exponent - 127 - 7), 0.0) * on_grid
    variance = tl.maximum(width * width - spacing * spacing, 0.0) / 12
    return tl.where(n < CROWD, 0.0, variance)


@triton.jit
def _sums(x, slope, n, variance):
    """(maximum of x, sum of n exp(x - maximum), mean of x - maximum), each cell's spread included to second order."""
    top = tl.max(tl.where(n > 0, x, LOWEST))
    below = tl.minimum(tl.maximum(x - top, SMALLEST), 0.0)
    e = tl.where(x - top > ABOVE, 0.0, tl.exp(below))
    spread = tl.minimum(slope * slope * variance, MOST_SPREAD)
    weight = tl.where(n > 0, n * e, 0.0)
    total = tl.sum(weight * (1 + spread / 2))
    moment = tl.sum(tl.where(n > 0, weight * (below * (1 + spread / 2) + spread), 0.0))
    return top, total, moment / total, e


@triton.jit
def _solve(
    params, partials, counts, tangents, history, before, after, steps,
    vocab: tl.constexpr, splits: tl.constexpr, power: tl.constexpr,
):  # fmt: skip
    """One row's entropies and steps; of an active row, what becomes of a logit in each cell."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(steps + row, 0)
    tl.store(before + row, float("nan"))
    tl.store(after + row, float("nan"))
    p = params + row * COLUMNS
    if tl.load(p + METHOD) == NO_METHOD:
        return
    peak, total, mean, spread, off_grid, h, active = _row(params, partials, row, splits, power)
    tl.store(before + row, h)
    tl.store(after + row, h)
    if not active:
        return
    centre, inner, shift, _ = _grid(params, row, mean, spread)
    n, x, width = _contents(counts, row, inner, shift)
    variance = _variance(n, x, x + centre + peak, width, tl.where(off_grid < vocab / 2, 1.0, 0.0))
    if tl.load(p + METHOD) == ADAPTIVE:
        t, reached = _temperature(p, n, x, variance, h)
        tl.store(history + row * HISTORY * 3, t)
        tl.store(after + row, reached)
        tl.store(steps + row, 1)
    else:
        reached, taken = _descend(
            p, n, x, width, variance, total, centre, h, tangents + row * CELLS, history + row * HISTORY * 3
        )
        tl.store(after + row, reached)
        tl.store(steps + row, taken)


@triton.jit
def _descend(p, n, x, width, variance, total, centre, h, tangents, history):
    """EM-INF on the cells: (entropy, steps). Leaves each cell's tangent, NaN where it breaks, and each step's scalars.

    x and its derivative `slope` with respect to the logit go through the same steps. The first step knows the row's
    exact sums, which come from the logits themselves; the origin of x is the row's mean.
    """
    threshold, steps = tl.load(p + THRESHOLD), tl.load(p + STEPS)
    rate, kl, adam = tl.load(p + RATE), tl.load(p + KL), tl.load(p + ADAM)
    x0 = x
    slope = tl.full([CELLS], 1.0, tl.float32)
    m, v = tl.zeros([CELLS], tl.float32), tl.zeros([CELLS], tl.float32)
    dm, dv = tl.zeros([CELLS], tl.float32), tl.zeros([CELLS], tl.float32)
    broken = tl.zeros([CELLS], tl.int32)
    top, share, mean = -centre, 1.0 / total, centre
    e = tl.where(x - top > ABOVE, 0.0, tl.exp(tl.minimum(tl.maximum(x - top, SMALLEST), 0.0)))
    p0 = e * share
    decay1, decay2 = 1.0, 1.0
    taken = 0
    while (taken < steps) & (h >= threshold):
        tl.store(history + taken * 3, top)
        tl.store(history + taken * 3 + 1, share)
        tl.store(history + taken * 3 + 2, top + mean)
        q = e * share
        c = x - (top + mean)
        g = kl * (q - p0) - q * c
        dg = kl * (q * slope - p0) - q * slope * (c + 1)
        if adam != 0:
            decay1 *= BETA1
            decay2 *= BETA2
            m = BETA1 * m + (1 - BETA1) * g
            v = BETA2 * v + (1 - BETA2) * g * g
            dm = BETA1 * dm + (1 - BETA1) * dg
            dv = BETA2 * dv + 2 * (1 - BETA2) * g * dg
            root = tl.sqrt(v / (1 - decay2))
            below = 1 / (root + EPSILON)
            droot = tl.where(root > 1e-18, dv / (1 - decay2) / (2 * tl.maximum(root, 1e-18)), 0.0)
            broken = tl.where(tl.abs(c) <= 0.75 * width * tl.abs(slope), 1, broken)
            x -= rate / (1 - decay1) * m * below
            slope -= rate / (1 - decay1) * (dm - m * droot * below) * below
        else:
            x -= rate * g
            slope -= rate * dg
        slope = tl.minimum(tl.maximum(slope, -STEEPEST), STEEPEST)
        taken += 1
        top, total, mean, e = _sums(x, slope, n, variance)
        share = 1.0 / total
        h = tl.maximum(tl.log(total) - mean, 0.0)
    tangent = tl.where(n == 1, 0.0, slope - 1)  # the cell's logit is at x0 itself
    broken = tl.where(n == 1, 0, tl.where(tl.abs(tangent) * width > STEEP, 1, broken))
    moved = tl.where(broken > 0, float("nan"), x - x0 - tangent * x0)
    low = moved.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(tangents + tl.arange(0, CELLS), (tangent.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low)
    return h, taken


@triton.jit
def _temperature(p, n, x, variance, h):
    """(the largest temperature at which the entropy reaches its target, the entropy there).

    Newton's steps on log T, of which the entropy's derivative is Var_p[x / T], with bisection where they would leave
    the bracket.
    """
    target = tl.maximum(tl.load(p + RATIO) * h, tl.load(p + THRESHOLD))
    low, high = tl.log(tl.load(p + MIN_T)), tl.log(tl.load(p + MAX_T))
    hottest, _ = _entropy_at(high, n, x, variance)
    coldest, _ = _entropy_at(low, n, x, variance)
    log_t = tl.minimum(tl.maximum(low, 0.0), high)
    log_t = tl.where(coldest > target, low, log_t)
    log_t = tl.where(hottest <= target, high, log_t)
    searching = (coldest <= target) & (hottest > target)
    reached = tl.where(hottest <= target, hottest, coldest)
    trial = 0
    while searching & (trial < MAX_TRIALS):
        trial += 1
        reached, slope = _entropy_at(log_t, n, x, variance)
        cold = reached <= target
        low, high = tl.where(cold, log_t, low), tl.where(cold, high, log_t)
        following = log_t + (target - reached) / tl.maximum(slope, 1e-30)
        following = tl.where((following > low) & (following < high), following, (low + high) / 2)
        searching = tl.abs(following - log_t) >= TEMPERATURE_TOLERANCE
        log_t = tl.where(searching, following, log_t)
    return tl.exp(log_t), reached


@triton.jit
def _entropy_at(log_t, n, x, variance):
    """(entropy at temperature exp(log_t), its derivative with respect to log_t)."""
    cold = tl.exp(-log_t)
    top, total, mean, e = _sums(x * cold, cold, n, variance)
    centred = tl.maximum(x * cold - top, SMALLEST) - mean
    return tl.maximum(tl.log(total) - mean, 0.0), tl.sum(tl.where(n > 0, n * e * centred * centred, 0.0)) / total


@triton.jit
def _move(
    logits,
    stride,
    params,
    partials,
    tangents,
    history,
    steps,
    vocab: tl.constexpr,
    splits: tl.constexpr,
    power: tl.constexpr,
):
    """The new logits of one chunk of a row that took steps."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    taken = tl.load(steps + row)
    if taken == 0:
        return
    at = split * CHUNK + tl.arange(0, CHUNK)
    mask = at < vocab
    z = tl.load(logits + row * stride + at, mask=mask, other=-float("inf"))
    history += row * HISTORY * 3
    if tl.load(params + row * COLUMNS + METHOD) == ADAPTIVE:
        tl.store(logits + row * stride + at, tl.div_rn(z, tl.load(history)), mask=mask)
        return
    peak, _, mean, spread, _, _, _ = _row(params, partials, row, splits, power)
    centre, inner, shift, _ = _grid(params, row, mean, spread)
    x = (z - peak) - centre
    cell, _ = _cell(x, inner, shift)
    packed = tl.load(tangents + row * CELLS + cell)
    moved = (
        packed.to(tl.int32).to(tl.float32, bitcast=True) + (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True) * x
    )
    moved = tl.where(x > -_power_of_2(inner + OCTAVES_EM_INF), moved, 0.0)  # further down nothing moves
    broken = moved != moved
    if tl.max(broken.to(tl.int32)) > 0:
        moved = tl.where(broken, _retrace(x, params + row * COLUMNS, history, taken), moved)
    tl.store(logits + row * stride + at, z + moved, mask=mask)


@triton.jit
def _retrace(x0, p, history, taken):
    """How far logits at x0 move, by the row's scalars of every step: exact, and rarely needed."""
    rate, kl, adam = tl.load(p + RATE), tl.load(p + KL), tl.load(p + ADAM)
    x = tl.maximum(x0, SMALLEST)
    start = x
    m, v, p0 = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    decay1, decay2 = 1.0, 1.0
    for step in range(taken):
        top, share, centre = (
            tl.load(history + step * 3),
            tl.load(history + step * 3 + 1),
            tl.load(history + step * 3 + 2),
        )
        q = tl.exp(tl.minimum(tl.maximum(x - top, SMALLEST), 0.0)) * share
        p0 = tl.where(step == 0, q, p0)
        g = kl * (q - p0) - q * (x - centre)
        if adam != 0:
            decay1 *= BETA1
            decay2 *= BETA2
            m = BETA1 * m + (1 - BETA1) * g
            v = BETA2 * v + (1 - BETA2) * g * g
            x -= rate / (1 - decay1) * m / (tl.sqrt(v / (1 - decay2)) + EPSILON)
        else:
            x -= rate * g
    return x - start
