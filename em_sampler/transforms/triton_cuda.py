"""The transform on CUDA in Triton: four launches per batch, whatever its rows, their params and the number of steps.

A row's logits are counted in a histogram that is fine where the transform is not smooth. The gradient steps run on its
4,096 cells, each with a tangent; every logit then moves by the tangent of its cell: docs/the-transform.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from em_sampler.params import MAX_STEPS
from em_sampler.transforms import reference
from em_sampler.transforms.batch import BatchParams, Column, Method, TransformOutput

C = tl.constexpr  # Triton accepts no other globals, and no enums
OFF, EM_INF = C(Method.OFF.value), C(Method.EM_INF.value)
ADAPTIVE_TEMPERATURE = C(Method.ADAPTIVE_TEMPERATURE.value)
METHOD, THRESHOLD, STEPS = C(Column.METHOD.value), C(Column.THRESHOLD.value), C(Column.STEPS.value)
LEARNING_RATE, KL_WEIGHT, ADAM = C(Column.LEARNING_RATE.value), C(Column.KL_WEIGHT.value), C(Column.ADAM.value)
RATIO, MIN_TEMPERATURE = C(Column.RATIO.value), C(Column.MIN_TEMPERATURE.value)
MAX_TEMPERATURE, COLUMNS = C(Column.MAX_TEMPERATURE.value), C(len(Column))
BETA1, BETA2, EPSILON = C(reference.BETA1), C(reference.BETA2), C(reference.EPSILON)

CHUNK = C(4096)  # logits of one program
PARTIALS = C(5)  # numbers that a program leaves of its chunk: see `_row_stats_kernel`
HISTORY, SCALARS = C(MAX_STEPS), C(3)  # a row's scalars of every step: the top, 1 / total, the centre

# The histogram: a cell is a sign, an octave and some bits of the distance from the row's centre. A row of EM-INF has 16
# octaves, down from its own spread, with 7 bits each. A row of adaptive temperature has 32 octaves from 2^-16 up, with
# 6 bits each: it may look further down.
CELLS, CELLS_PER_SIGN = C(4096), C(2048)
OCTAVES_EM_INF, MIN_OCTAVE_EM_INF, MIN_OCTAVE_ADAPTIVE = C(16), C(-100), C(-16)
CELL_BITS_EM_INF, CELL_BITS_ADAPTIVE = C(16), C(17)  # a cell spans 2^this neighbouring float32 numbers
# A cell packs into one integer how many logits fell into it and, in the lower bits, the sum of their positions in it.
COUNT_SHIFT, POSITION_MASK = C(40), C((1 << 40) - 1)

CUTOFF_NATS_EM_INF = C(25.0)  # logits further below the peak do not count: 150,000 of them weigh 2e-6
MIN_EXP_ARGUMENT = C(-87.0)  # e^-87 is nothing beside the peak's 1
LOWEST_LOGIT = C(-3e38)  # stands in for -inf wherever numbers are subtracted
MIN_SPREAD_COUNT = C(8)  # the logits of a cell with fewer are taken to be equal
MAX_ABOVE_TOP = C(0.01)  # cells further above the highest logit are empty, and must not run away
MAX_SLOPE = C(1e4)  # nor may a slope
MAX_TANGENT_MOVE = C(0.01)  # a cell is not trusted with its tangent if the move differs by more across it
MAX_CELL_VARIANCE = C(0.1)  # beyond this variance within a cell, its second-order term says nothing

TEMPERATURE_TOLERANCE = C(1e-6)  # relative
MAX_TRIALS = C(60)  # of temperatures; bisection alone needs 24


class TritonTransform:
    """The implementation for CUDA: no host synchronisation and no allocation in a call, results equal to the bit.

    Building it allocates all memory and compiles all code. The next call overwrites the stats that a call returned.
    """

    def __init__(self, vocab_size: int, device: torch.device, max_rows: int) -> None:
        self.splits, max_rows = triton.cdiv(vocab_size, CHUNK.value), max(max_rows, 1)

        def floats(*shape: int) -> Tensor:
            return torch.empty(max_rows, *shape, dtype=torch.float32, device=device)

        self.partials = floats(self.splits, PARTIALS.value)
        self.counts = torch.zeros(max_rows, CELLS.value, dtype=torch.int64, device=device)  # all zero between calls
        self.tangents = torch.empty_like(self.counts)  # two float32 each: the move at x = 0, and what x adds to it
        self.history = floats(HISTORY.value, SCALARS.value)
        self.stats = torch.empty(3, max_rows, dtype=torch.int32, device=device)
        self.before, self.after = self.stats[:2].view(torch.float32)
        self.steps = self.stats[2]
        self(torch.zeros(1, vocab_size, device=device), BatchParams.of([None], device))

    def __call__(self, logits: Tensor, params: BatchParams) -> TransformOutput:
        """Transform `logits` [rows, vocab] float32 in place, row i by row i of `params`."""
        rows, vocab = logits.shape
        if rows:
            sizes = {"VOCAB": vocab, "SPLITS": self.splits, "SPLITS_POW2": triton.next_power_of_2(self.splits)}
            # No fused multiply-add: p - p0 must be exactly 0 until something has moved.
            options = sizes | {"num_warps": 16, "enable_fp_fusion": False}
            chunks, row = (logits, logits.stride(0)), (params.values, self.partials)
            _row_stats_kernel[self.splits, rows](*chunks, *row, **options)
            _histogram_kernel[self.splits, rows](*chunks, *row, self.counts, **options)
            results = self.before, self.after, self.steps
            _solve_kernel[rows,](*row, self.counts, self.tangents, self.history, *results, **options)
            moves = self.tangents, self.history, self.steps
            _apply_kernel[self.splits, rows](*chunks, *row, *moves, **options | {"num_warps": 32})
        return TransformOutput(logits, self.stats[:, :rows])


@triton.jit
def _row_stats_kernel(
    logits_ptr, row_stride, params_ptr, partials_ptr,
    VOCAB: tl.constexpr, SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr,
):  # fmt: skip
    """Store the partials of one chunk of a row, for `_combine_partials`.

    These are the maximum, the sum and the first moment of exp(z - maximum), the lowest logit within the cutoff of the
    maximum, and the number of logits that bfloat16 cannot represent: infinite if the chunk holds NaN or +inf.
    """
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(params_ptr + row * COLUMNS + METHOD) == OFF:
        return
    at = split * CHUNK + tl.arange(0, CHUNK)
    z = tl.load(logits_ptr + row * row_stride + at, mask=at < VOCAB, other=-float("inf"))
    off_grid = ((z.to(tl.int32, bitcast=True) & 0xFFFF) != 0).to(tl.float32)
    off_grid = tl.where((z != z) | (z == float("inf")), float("inf"), off_grid)
    peak = tl.maximum(tl.max(z), LOWEST_LOGIT)
    below = tl.maximum(z - peak, MIN_EXP_ARGUMENT)
    e = tl.where(z - peak > MIN_EXP_ARGUMENT, tl.exp(below), 0.0)
    out = partials_ptr + (row * SPLITS + split) * PARTIALS
    tl.store(out, peak)
    tl.store(out + 1, tl.sum(e))
    tl.store(out + 2, tl.sum(e * below))
    tl.store(out + 3, tl.min(tl.where(z - peak > -CUTOFF_NATS_EM_INF, z, peak)))
    tl.store(out + 4, tl.sum(off_grid))


@triton.jit
def _combine_partials(params_ptr, partials_ptr, row, SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr):
    """Return (peak, total, mean, spread, off_grid, entropy, active) of a row.

    total: the sum of exp(z - peak). mean: of z - peak, under the probabilities. spread: peak minus lowest logit within
    the cutoff. off_grid: the number of logits that bfloat16 cannot represent. entropy: NaN if the row is to be left as
    it is. active: whether its method changes it.
    """
    split = tl.arange(0, SPLITS_POW2)
    at, mask = partials_ptr + (row * SPLITS + split) * PARTIALS, split < SPLITS
    peaks = tl.load(at, mask=mask, other=LOWEST_LOGIT)
    sums = tl.load(at + 1, mask=mask, other=0.0)
    moments = tl.load(at + 2, mask=mask, other=0.0)
    lows = tl.load(at + 3, mask=mask, other=LOWEST_LOGIT)
    off_grid = tl.sum(tl.load(at + 4, mask=mask, other=0.0))
    peak = tl.max(peaks)
    below = tl.maximum(peaks - peak, MIN_EXP_ARGUMENT)
    scale = tl.where(peaks - peak > MIN_EXP_ARGUMENT, tl.exp(below), 0.0)
    total = tl.sum(sums * scale)
    mean = tl.sum((moments + sums * below) * scale) / total
    spread = tl.max(tl.where(peaks - peak > -CUTOFF_NATS_EM_INF, tl.minimum(peak - lows, CUTOFF_NATS_EM_INF), 0.0))
    h = tl.maximum(tl.log(total) - mean, 0.0)
    h = tl.where((off_grid == float("inf")) | (peak == LOWEST_LOGIT), float("nan"), h)
    p = params_ptr + row * COLUMNS
    method, threshold = tl.load(p + METHOD), tl.load(p + THRESHOLD)
    descends = (method == EM_INF) & (h >= threshold) & (tl.load(p + STEPS) > 0)
    active = descends | ((method == ADAPTIVE_TEMPERATURE) & (h > threshold))
    return peak, total, mean, spread, off_grid, h, active


@triton.jit
def _lay_out_cells(params_ptr, row, mean, spread):
    """Return the layout of a row's histogram: (centre, smallest octave's exponent, bits of a cell, cutoff in nats).

    The centre is relative to the peak. The moves of EM-INF are not smooth at its cut, where log p + H = 0: that is the
    mean. Adaptive temperature depends most on the logits next to the peak, and the hotter it may become, the further
    down it looks.
    """
    p = params_ptr + row * COLUMNS
    adaptive = tl.load(p + METHOD) == ADAPTIVE_TEMPERATURE
    outer = (spread.to(tl.int32, bitcast=True) >> 23) - 127 + 1  # the octave above the spread
    min_octave = tl.where(adaptive, MIN_OCTAVE_ADAPTIVE, tl.maximum(outer - OCTAVES_EM_INF, MIN_OCTAVE_EM_INF))
    cell_bits = tl.where(adaptive, CELL_BITS_ADAPTIVE, CELL_BITS_EM_INF)
    hottest = tl.maximum(tl.load(p + MAX_TEMPERATURE), 1.0)
    return (
        tl.where(adaptive, 0.0, mean),
        min_octave,
        cell_bits,
        tl.where(adaptive, -MIN_EXP_ARGUMENT * hottest, CUTOFF_NATS_EM_INF),
    )


@triton.jit
def _find_cell(x, min_octave, cell_bits):
    """Return (cell, position in the cell, from 0 to below 2^cell_bits) for distances x from the centre."""
    bits = x.to(tl.int32, bitcast=True)
    size, low = bits & 0x7FFFFFFF, (min_octave + 127) << 23
    near = tl.minimum(tl.abs(x) / _power_of_2(min_octave), 1.0) * _power_of_2(
        cell_bits
    )  # the smallest octave goes on to 0
    position = tl.where(size < low, near.to(tl.int32), size) & ((1 << cell_bits) - 1)
    cell = tl.minimum(tl.maximum(size - low, 0) >> cell_bits, CELLS_PER_SIGN - 1)
    return tl.where(bits < 0, cell + CELLS_PER_SIGN, cell), position


@triton.jit
def _power_of_2(exponent):
    """Return 2^exponent in float32 for an integer exponent."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _histogram_kernel(
    logits_ptr, row_stride, params_ptr, partials_ptr, counts_ptr,
    VOCAB: tl.constexpr, SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr,
):  # fmt: skip
    """Add one chunk of an active row to its histogram, in integers: the order of the additions changes nothing."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(params_ptr + row * COLUMNS + METHOD) == OFF:
        return
    peak, _, mean, spread, _, _, active = _combine_partials(params_ptr, partials_ptr, row, SPLITS, SPLITS_POW2)
    if not active:
        return
    at = split * CHUNK + tl.arange(0, CHUNK)
    z = tl.load(logits_ptr + row * row_stride + at, mask=at < VOCAB, other=-float("inf"))
    centre, min_octave, cell_bits, cutoff = _lay_out_cells(params_ptr, row, mean, spread)
    cell, position = _find_cell((z - peak) - centre, min_octave, cell_bits)
    one = (tl.full([CHUNK], 1, tl.int64) << COUNT_SHIFT) + position
    tl.atomic_add(counts_ptr + row * CELLS + cell, one, mask=z - peak > -cutoff, sem="relaxed")


@triton.jit
def _read_cells(counts_ptr, row, min_octave, cell_bits):
    """Read and clear the histogram: return (count, mean x, width) of each cell. An empty cell has its midpoint."""
    k = tl.arange(0, CELLS)
    packed = tl.load(counts_ptr + row * CELLS + k)
    tl.store(counts_ptr + row * CELLS + k, tl.zeros([CELLS], tl.int64))
    n = (packed >> COUNT_SHIFT).to(tl.float32)
    position = (packed & POSITION_MASK).to(tl.float32) / tl.maximum(n, 1.0) / _power_of_2(cell_bits)
    bits = ((min_octave + 127) << 23) + ((k & (CELLS_PER_SIGN - 1)) << cell_bits)
    low, high = bits.to(tl.float32, bitcast=True), (bits + (1 << cell_bits)).to(tl.float32, bitcast=True)
    low = tl.where((k & (CELLS_PER_SIGN - 1)) == 0, 0.0, low)
    size = low + (high - low) * tl.where(n > 0, position, 0.5)
    return n, tl.where(k < CELLS_PER_SIGN, size, -size), high - low


@triton.jit
def _cell_variance(n, x, z, width, on_grid):
    """Return the variance of x within each cell. The logits z of a cell are assumed to be spread evenly.

    With `on_grid`, over the values that bfloat16 can represent there; without it, over the complete cell.
    """
    exponent = (z.to(tl.int32, bitcast=True) >> 23) & 0xFF
    spacing = tl.where(exponent > 7, _power_of_2(exponent - 127 - 7), 0.0) * on_grid
    variance = tl.maximum(width * width - spacing * spacing, 0.0) / 12
    return tl.where(n < MIN_SPREAD_COUNT, 0.0, variance)


@triton.jit
def _sum_cells(x, slope, n, variance):
    """Return (top, total, mean, e) of cells at x: maximum, sum of n * e, mean of x - top, and e = exp(x - top).

    The variance within each cell enters the sums to second order; `slope` says how the cell was stretched.
    """
    top = tl.max(tl.where(n > 0, x, LOWEST_LOGIT))
    below = tl.minimum(tl.maximum(x - top, MIN_EXP_ARGUMENT), 0.0)
    e = tl.where(x - top > MAX_ABOVE_TOP, 0.0, tl.exp(below))
    spread = tl.minimum(slope * slope * variance, MAX_CELL_VARIANCE)
    weight = tl.where(n > 0, n * e, 0.0)
    total = tl.sum(weight * (1 + spread / 2))
    moment = tl.sum(tl.where(n > 0, weight * (below * (1 + spread / 2) + spread), 0.0))
    return top, total, moment / total, e


@triton.jit
def _solve_kernel(
    params_ptr, partials_ptr, counts_ptr, tangents_ptr, history_ptr, before_ptr, after_ptr, steps_ptr,
    VOCAB: tl.constexpr, SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr,
):  # fmt: skip
    """Store one row's entropies and steps and, if the row is active, what becomes of the logits of each cell."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(steps_ptr + row, 0)
    tl.store(before_ptr + row, float("nan"))
    tl.store(after_ptr + row, float("nan"))
    p = params_ptr + row * COLUMNS
    if tl.load(p + METHOD) == OFF:
        return
    peak, total, mean, spread, off_grid, h, active = _combine_partials(
        params_ptr, partials_ptr, row, SPLITS, SPLITS_POW2
    )
    tl.store(before_ptr + row, h)
    tl.store(after_ptr + row, h)
    if not active:
        return
    centre, min_octave, cell_bits, _ = _lay_out_cells(params_ptr, row, mean, spread)
    n, x, width = _read_cells(counts_ptr, row, min_octave, cell_bits)
    variance = _cell_variance(n, x, x + centre + peak, width, tl.where(off_grid < VOCAB / 2, 1.0, 0.0))
    if tl.load(p + METHOD) == ADAPTIVE_TEMPERATURE:
        t, reached = _temperature(p, n, x, variance, h)
        tl.store(history_ptr + row * HISTORY * SCALARS, t)
        tl.store(after_ptr + row, reached)
        tl.store(steps_ptr + row, 1)
    else:
        reached, taken = _descend(
            p, n, x, width, variance, total, centre, h,
            tangents_ptr + row * CELLS, history_ptr + row * HISTORY * SCALARS,
        )  # fmt: skip
        tl.store(after_ptr + row, reached)
        tl.store(steps_ptr + row, taken)


@triton.jit
def _descend(p, n, x, width, variance, total, centre, h, tangents_ptr, history_ptr):
    """Apply EM-INF to the cells; return (entropy, steps). Store each cell's tangent and each step's scalars.

    x and its derivative `slope` with respect to the logit go through the same steps. The origin of x is the row's mean.
    The first step has the row's exact sums, which were taken over the logits themselves. The tangent of a cell that it
    does not fit is NaN: its logits are retraced one by one.
    """
    threshold, steps = tl.load(p + THRESHOLD), tl.load(p + STEPS)
    rate, kl, adam = tl.load(p + LEARNING_RATE), tl.load(p + KL_WEIGHT), tl.load(p + ADAM)
    x0 = x
    slope = tl.full([CELLS], 1.0, tl.float32)
    m, v = tl.zeros([CELLS], tl.float32), tl.zeros([CELLS], tl.float32)
    dm, dv = tl.zeros([CELLS], tl.float32), tl.zeros([CELLS], tl.float32)
    broken = tl.zeros([CELLS], tl.int32)
    top, share, mean = -centre, 1.0 / total, centre
    e = tl.where(x - top > MAX_ABOVE_TOP, 0.0, tl.exp(tl.minimum(tl.maximum(x - top, MIN_EXP_ARGUMENT), 0.0)))
    p0 = e * share
    decay1, decay2 = 1.0, 1.0
    taken = 0
    while (taken < steps) & (h >= threshold):
        tl.store(history_ptr + taken * SCALARS, top)
        tl.store(history_ptr + taken * SCALARS + 1, share)
        tl.store(history_ptr + taken * SCALARS + 2, top + mean)
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
        slope = tl.minimum(tl.maximum(slope, -MAX_SLOPE), MAX_SLOPE)
        taken += 1
        top, total, mean, e = _sum_cells(x, slope, n, variance)
        share = 1.0 / total
        h = tl.maximum(tl.log(total) - mean, 0.0)
    tangent = tl.where(n == 1, 0.0, slope - 1)  # the cell's logit is at x0 itself
    broken = tl.where(n == 1, 0, tl.where(tl.abs(tangent) * width > MAX_TANGENT_MOVE, 1, broken))
    moved = tl.where(broken > 0, float("nan"), x - x0 - tangent * x0)
    low = moved.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(tangents_ptr + tl.arange(0, CELLS), (tangent.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low)
    return h, taken


@triton.jit
def _temperature(p, n, x, variance, h):
    """Return (the largest temperature whose entropy does not exceed the target, the entropy there).

    Takes Newton's steps on log T, with dH / d log T = Var_p[x / T], and bisects if a step would leave the bracket.
    """
    target = tl.maximum(tl.load(p + RATIO) * h, tl.load(p + THRESHOLD))
    low, high = tl.log(tl.load(p + MIN_TEMPERATURE)), tl.log(tl.load(p + MAX_TEMPERATURE))
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
    """Return (entropy in nats at temperature exp(log_t), its derivative with respect to log_t)."""
    cold = tl.exp(-log_t)
    top, total, mean, e = _sum_cells(x * cold, cold, n, variance)
    centred = tl.maximum(x * cold - top, MIN_EXP_ARGUMENT) - mean
    return tl.maximum(tl.log(total) - mean, 0.0), tl.sum(tl.where(n > 0, n * e * centred * centred, 0.0)) / total


@triton.jit
def _apply_kernel(
    logits_ptr, row_stride, params_ptr, partials_ptr, tangents_ptr, history_ptr, steps_ptr,
    VOCAB: tl.constexpr, SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr,
):  # fmt: skip
    """Store the new logits of one chunk of a row that took steps."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    taken = tl.load(steps_ptr + row)
    if taken == 0:
        return
    at = split * CHUNK + tl.arange(0, CHUNK)
    mask = at < VOCAB
    z = tl.load(logits_ptr + row * row_stride + at, mask=mask, other=-float("inf"))
    history_ptr += row * HISTORY * SCALARS
    if tl.load(params_ptr + row * COLUMNS + METHOD) == ADAPTIVE_TEMPERATURE:
        tl.store(logits_ptr + row * row_stride + at, tl.div_rn(z, tl.load(history_ptr)), mask=mask)
        return
    peak, _, mean, spread, _, _, _ = _combine_partials(params_ptr, partials_ptr, row, SPLITS, SPLITS_POW2)
    centre, min_octave, cell_bits, _ = _lay_out_cells(params_ptr, row, mean, spread)
    x = (z - peak) - centre
    cell, _ = _find_cell(x, min_octave, cell_bits)
    packed = tl.load(tangents_ptr + row * CELLS + cell)
    moved = (
        packed.to(tl.int32).to(tl.float32, bitcast=True) + (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True) * x
    )
    moved = tl.where(x > -_power_of_2(min_octave + OCTAVES_EM_INF), moved, 0.0)  # further down nothing moves
    broken = moved != moved
    if tl.max(broken.to(tl.int32)) > 0:
        moved = tl.where(broken, _retrace(x, params_ptr + row * COLUMNS, history_ptr, taken), moved)
    tl.store(logits_ptr + row * row_stride + at, z + moved, mask=mask)


@triton.jit
def _retrace(x0, p, history_ptr, taken):
    """Return how far logits at x0 move, exactly, from the row's scalars of every step. Few logits need it."""
    rate, kl, adam = tl.load(p + LEARNING_RATE), tl.load(p + KL_WEIGHT), tl.load(p + ADAM)
    x = tl.maximum(x0, MIN_EXP_ARGUMENT)
    start = x
    m, v, p0 = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    decay1, decay2 = 1.0, 1.0
    for step in range(taken):
        top, share, centre = (
            tl.load(history_ptr + step * SCALARS),
            tl.load(history_ptr + step * SCALARS + 1),
            tl.load(history_ptr + step * SCALARS + 2),
        )
        q = tl.exp(tl.minimum(tl.maximum(x - top, MIN_EXP_ARGUMENT), 0.0)) * share
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
