"""The transform's kernels for CUDA in Triton, in the order of their launch; triton_cuda.py launches them.

A row's logits are counted in a histogram that is fine where the transform is not smooth. The gradient steps run on its
cells, each with a tangent, and on the row's heavy logits; every other logit then moves by the tangent of its cell:
docs/the-transform.md.
"""

import triton
import triton.language as tl

from em_sampler import params
from em_sampler.transforms import batch, reference
from em_sampler.transforms.batch import Column, Method

C = tl.constexpr  # Triton accepts no other globals, and no enums
OFF, EM_INF = C(Method.OFF.value), C(Method.EM_INF.value)
ADAPTIVE_TEMPERATURE = C(Method.ADAPTIVE_TEMPERATURE.value)
P_LESS, TOP_H, TOP_N_SIGMA = C(Method.P_LESS.value), C(Method.TOP_H.value), C(Method.TOP_N_SIGMA.value)
CUT = C(params.CUT)
METHOD, THRESHOLD, STEPS = C(Column.METHOD.value), C(Column.THRESHOLD.value), C(Column.STEPS.value)
LEARNING_RATE, KL_WEIGHT, ADAM = C(Column.LEARNING_RATE.value), C(Column.KL_WEIGHT.value), C(Column.ADAM.value)
RATIO, MIN_TEMPERATURE = C(Column.RATIO.value), C(Column.MIN_TEMPERATURE.value)
MAX_TEMPERATURE, COLUMNS = C(Column.MAX_TEMPERATURE.value), C(len(Column))
TEMPERATURE, WANTS_STATS = C(Column.TEMPERATURE.value), C(Column.STATS.value)
NORMALIZED, ALPHA = C(Column.NORMALIZED.value), C(Column.ALPHA.value)
N, P_MAX = C(Column.N.value), C(Column.P_MAX.value)
BETA1, BETA2, EPSILON = C(reference.BETA1), C(reference.BETA2), C(reference.EPSILON)

CHUNK = C(4096)  # logits of one program
# Of these, how many at a time: more would take the registers of another program.
PART, LIST_PART = C(1024), C(512)
PARTIALS = C(10)  # numbers that a program leaves of its chunk: see `row_stats_kernel`
HISTORY, STEP_SCALARS = C(params.MAX_STEPS), C(3)  # a row's scalars of every step: the top, 1 / total, mean minus top
# A row's scalars: see `row_scalars_kernel`.
PEAK, TOTAL, MEAN, SPREAD, OFF_GRID, ENTROPY, HEAVY_FROM, ACTIVE, LOWEST, LIMIT, SCALARS = (C(i) for i in range(11))

# The histogram: a cell is a sign, an octave and some bits of the distance from the row's centre. A row of EM-INF has 16
# octaves, down from its own spread, with 7 bits each. A row of adaptive temperature has 32 octaves from 2^-16 up, with
# 6 bits each: it may look further down. So has a row of top_h, from 2^-24 up: closer to the peak, tokens are tied.
CELLS, CELLS_PER_SIGN = C(4096), C(2048)
OCTAVES_EM_INF, MIN_OCTAVE_EM_INF, MIN_OCTAVE_ADAPTIVE, MIN_OCTAVE_TOP_H = C(16), C(-100), C(-16), C(-24)
CELL_BITS_EM_INF, CELL_BITS_ADAPTIVE = C(16), C(17)  # a cell spans 2^this neighbouring float32 numbers
# The cell of top_h's bound is counted again, in 4,096 parts, and one of these by each of its 32 numbers.
CELL_NUMBERS, PART_NUMBERS = C(1 << CELL_BITS_ADAPTIVE.value), C(32)
MAX_CUTOFF_TOP_H = C(255.0)  # nats; its histogram ends at 256
# A cell packs into one integer how many logits fell into it and, in the lower bits, the sum of their positions in it.
COUNT_SHIFT, POSITION_MASK = C(40), C((1 << 40) - 1)

# A logit with a probability of at least 1 / 4096 is heavy: it stays out of the histogram and is worked exactly, since
# others next to it may part from it. A row has at most 4,096 of them.
HEAVY, HEAVY_NATS, LOG_2 = C(4096), C(8.317766), C(0.6931472)
# `solve_kernel` works on particles: the cells that matter, then the heavy logits. Few rows have more than NARROW.
PARTICLES, NARROW = C(4096 + 4096), C(1024)
DOUBTFUL = C(PARTICLES.value + 1)  # takes the place of their number if the solve is not to be trusted
MAX_DOUBT, MAX_EXACT_SLOPE = C(1e-5), C(30.0)  # see `_descend`
MIN_WIDTH = C(1e-20)  # cells as narrow as those of a uniform row: their logits are equal, and do not move

CUTOFF_NATS_EM_INF = C(25.0)  # logits further below the peak do not count: 150,000 of them weigh 2e-6
MIN_EXP_ARGUMENT = C(-87.0)  # e^-87 is nothing beside the peak's 1
LOWEST_LOGIT = C(-3e38)  # stands in for -inf wherever numbers are subtracted
MIN_SPREAD_COUNT = C(8)  # the logits of a cell with fewer are taken to be equal
MAX_ABOVE_TOP = C(0.01)  # cells further above the highest logit are empty, and must not run away
MAX_SLOPE = C(1e4)  # nor may a slope
MAX_TANGENT_MOVE = C(0.01)  # a cell is not trusted with its tangent if the move differs by more across it
# Nor if it differs by this much, for logits with less probability than FAINT. Adam moves these less and less, the
# fainter they are: their cells are wide and their tangents steep, but the curve is smooth.
FAINT, MAX_FAINT_TANGENT_MOVE = C(1e-7), C(1.0)
SAME_X = C(3e-7)  # relative: two x this close are the same
MAX_CELL_VARIANCE = C(0.1)  # beyond this variance within a cell, its second-order term says nothing

ROUNDING = C(batch.ROUNDING)
TEMPERATURE_TOLERANCE = C(1e-6)  # relative
MAX_TRIALS = C(60)  # of temperatures; bisection alone needs 24


@triton.jit
def row_stats_kernel(
    logits_ptr, row_stride, params_ptr, partials_ptr, active_ptr,
    VOCAB: tl.constexpr, SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr,
):  # fmt: skip
    """Store the partials of one chunk of a row, for `row_scalars_kernel`.

    These are the maximum, the sum and the first moment of exp(z - maximum), the lowest logit within the cutoff of the
    maximum, and how many logits within this cutoff bfloat16 cannot represent, minus how many it can: infinite if the
    chunk holds NaN or +inf. If stats are wanted, the second moment. For a method that removes tokens, how many logits
    are finite, and three more: for top_n_sigma the mean of z - maximum over these and the sum of squares about it; for
    the others the sum of e = exp((z - maximum) / T), its first moment and the sum of e^2. The list of active rows
    becomes empty.
    """
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if (split == 0) & (row == 0):
        tl.store(active_ptr, 0)
    if tl.load(params_ptr + row * COLUMNS + METHOD) == OFF:
        return
    at = split * CHUNK + tl.arange(0, CHUNK)
    z = tl.load(logits_ptr + row * row_stride + at, mask=at < VOCAB, other=-float("inf"))
    peak = tl.maximum(tl.max(z), LOWEST_LOGIT)
    near = z - peak > -CUTOFF_NATS_EM_INF
    off_grid = tl.where(near, tl.where((z.to(tl.int32, bitcast=True) & 0xFFFF) != 0, 1.0, -1.0), 0.0)
    off_grid = tl.where(z < float("inf"), off_grid, float("inf"))  # NaN is not less either
    below = tl.maximum(z - peak, MIN_EXP_ARGUMENT)
    e = tl.where(z - peak > MIN_EXP_ARGUMENT, tl.exp(below), 0.0)
    out = partials_ptr + (row * SPLITS + split) * PARTIALS
    tl.store(out, peak)
    tl.store(out + 1, tl.sum(e))
    tl.store(out + 2, tl.sum(e * below))
    tl.store(out + 3, tl.min(tl.where(near, z, peak)))
    tl.store(out + 4, tl.sum(off_grid))
    p = params_ptr + row * COLUMNS
    if tl.load(p + WANTS_STATS) != 0:
        tl.store(out + 5, tl.sum(e * below * below))
    method = tl.load(p + METHOD)
    if method >= P_LESS:
        finite = z > -float("inf")
        n = tl.sum(finite.to(tl.float32))
        tl.store(out + 6, n)
        if method == TOP_N_SIGMA:
            x = tl.where(finite, z - peak, 0.0)
            mean = tl.sum(x) / tl.maximum(n, 1.0)
            x = tl.where(finite, x - mean, 0.0)
            tl.store(out + 7, mean)
            tl.store(out + 8, tl.sum(x * x))
        else:
            y = tl.maximum((z - peak) / tl.load(p + TEMPERATURE), MIN_EXP_ARGUMENT)
            e = tl.where(y > MIN_EXP_ARGUMENT, tl.exp(y), 0.0)
            tl.store(out + 7, tl.sum(e))
            tl.store(out + 8, tl.sum(e * y))
            tl.store(out + 9, tl.sum(e * e))


@triton.jit
def row_scalars_kernel(
    params_ptr, partials_ptr, scalars_ptr, active_ptr, counts_ptr, stats_ptr, stats_stride,
    SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr,
):  # fmt: skip
    """Store the scalars of one row and its stats without a step. If its method changes it, list it: it is active.

    The list begins with its length. Its order differs from call to call: nothing may depend on it. The histogram of an
    active row is cleared.

    PEAK: the highest logit. TOTAL: the sum of exp(z - peak). MEAN: of z - peak, under the probabilities. SPREAD: the
    peak minus the lowest logit within the cutoff. OFF_GRID: how many logits bfloat16 cannot represent, minus how many
    it can. ENTROPY: NaN if the row is to be left as it is. HEAVY_FROM: the z - peak from which on a logit is heavy.
    ACTIVE: 1 if its method changes the row, or may, else 0. LOWEST: the z - peak from which on a method that removes
    tokens keeps them; top_h finds it later, by LIMIT, the entropy that its tokens may have.
    """
    row = tl.program_id(0).to(tl.int64)
    p, out, stats = params_ptr + row * COLUMNS, scalars_ptr + row * SCALARS, stats_ptr + row
    if tl.load(p + METHOD) == OFF:
        tl.store(out + ACTIVE, 0.0)
        _store_stats(stats, stats_stride, float("nan"), float("nan"), 0)
        _store_varentropy(stats, stats_stride, float("nan"))
        return
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
    reach = tl.where(peaks - peak > -CUTOFF_NATS_EM_INF, tl.minimum(peak - lows, CUTOFF_NATS_EM_INF), 0.0)
    h = tl.maximum(tl.log(total) - mean, 0.0)
    h = tl.where((off_grid == float("inf")) | (peak == LOWEST_LOGIT), float("nan"), h)
    method, threshold = tl.load(p + METHOD), tl.load(p + THRESHOLD)
    descends = (method == EM_INF) & (h >= threshold) & (tl.load(p + STEPS) > 0)
    active = descends | ((method == ADAPTIVE_TEMPERATURE) & (h > threshold))
    variance = float("nan")
    if tl.load(p + WANTS_STATS) != 0:
        squares = tl.load(at + 5, mask=mask, other=0.0)
        square = tl.sum((squares + 2 * below * moments + below * below * sums) * scale) / total
        variance = tl.where(h >= 0, tl.maximum(square - mean * mean, 0.0), float("nan"))
    _store_varentropy(stats, stats_stride, variance)
    if method >= P_LESS:
        lowest, limit = _bound(p, at, mask, peaks - peak)
        tl.store(out + LOWEST, lowest)
        tl.store(out + LIMIT, limit)
        active = (h >= 0) & (lowest > -float("inf"))
    tl.store(out + PEAK, peak)
    tl.store(out + TOTAL, total)
    tl.store(out + MEAN, mean)
    tl.store(out + SPREAD, tl.max(reach))
    tl.store(out + OFF_GRID, off_grid)
    tl.store(out + ENTROPY, h)
    tl.store(out + HEAVY_FROM, tl.log(total) - HEAVY_NATS)
    tl.store(out + ACTIVE, active.to(tl.float32))
    _store_stats(stats, stats_stride, h, h, 0)
    if active:
        tl.store(active_ptr + 1 + tl.atomic_add(active_ptr, 1, sem="relaxed"), row.to(tl.int32))
        tl.store(counts_ptr + row * CELLS + tl.arange(0, CELLS), tl.zeros([CELLS], tl.int64))


@triton.jit
def _bound(p, at, mask, peaks):
    """Return (how far below the peak a method keeps tokens, up to 0 and -inf for all; the entropy that top_h allows).

    From the partials of a row's chunks, whose peaks are relative to the row's. The first is 0 for top_h, unless it
    keeps all.
    """
    method, temperature = tl.load(p + METHOD), tl.load(p + TEMPERATURE)
    n = tl.load(at + 6, mask=mask, other=0.0)
    first, second = tl.load(at + 7, mask=mask, other=0.0), tl.load(at + 8, mask=mask, other=0.0)
    words = tl.maximum(tl.sum(n), 1.0)
    lowest, limit = 0.0, 0.0
    if method == TOP_N_SIGMA:
        means = tl.where(n > 0, first + peaks, 0.0)
        mean = tl.sum(n * means) / words
        apart = tl.where(n > 0, means - mean, 0.0)
        lowest = -tl.load(p + N) * tl.sqrt(tl.sum(second + n * apart * apart) / words)
    else:
        below = tl.maximum(peaks / temperature, MIN_EXP_ARGUMENT)
        scale = tl.where(peaks / temperature > MIN_EXP_ARGUMENT, tl.exp(below), 0.0)
        total = tl.sum(first * scale)
        if method == TOP_H:
            mean = tl.sum((second + first * below) * scale) / total
            limit = tl.load(p + ALPHA) * tl.maximum(tl.log(total) - mean, 0.0) * (1 + ROUNDING)
            lowest = tl.where(tl.load(p + ALPHA) < 1, 0.0, -float("inf"))
        elif method == P_LESS:
            bound = tl.sum(tl.load(at + 9, mask=mask, other=0.0) * scale * scale) / (total * total)
            normalized = (words * bound - 1) / tl.maximum(words - 1, 1.0)
            bound = tl.where(tl.load(p + NORMALIZED) != 0, normalized, bound)
            # Never the logarithm of 0, nor of what is below 0 by rounding: then all tokens stay.
            lowest = temperature * (tl.log(tl.maximum(bound * total, 1e-37)) - ROUNDING)
            lowest = tl.where(bound > 0, tl.minimum(lowest, 0.0), -float("inf"))
        else:
            lowest = tl.where(1 / total < tl.load(p + P_MAX), 0.0, -float("inf"))
    return lowest, limit


@triton.jit
def _store_varentropy(stats, stats_stride, varentropy):
    tl.store(stats + 2 * stats_stride, tl.full([], varentropy, tl.float32).to(tl.int32, bitcast=True))


@triton.jit
def _store_stats(stats, stats_stride, before, after, steps):
    """Store a row of `TransformOutput.stats`, but for the varentropy."""
    tl.store(stats, tl.full([], before, tl.float32).to(tl.int32, bitcast=True))
    tl.store(stats + stats_stride, tl.full([], after, tl.float32).to(tl.int32, bitcast=True))
    tl.store(stats + 3 * stats_stride, steps)


@triton.jit
def _lay_out_cells(p, scalars):
    """Return the layout of a row's histogram: (centre, smallest octave's exponent, bits of a cell, cutoff in nats).

    The centre is relative to the peak. The moves of EM-INF are not smooth at its cut, where log p + H = 0: that is the
    mean. Adaptive temperature and top_h depend most on the logits next to the peak, and the hotter it may become, the
    further down they look.
    """
    top_h = tl.load(p + METHOD) == TOP_H
    adaptive = (tl.load(p + METHOD) == ADAPTIVE_TEMPERATURE) | top_h
    mean, spread = tl.load(scalars + MEAN), tl.load(scalars + SPREAD)
    outer = (spread.to(tl.int32, bitcast=True) >> 23) - 127 + 1  # the octave above the spread
    min_octave = tl.where(adaptive, MIN_OCTAVE_ADAPTIVE, tl.maximum(outer - OCTAVES_EM_INF, MIN_OCTAVE_EM_INF))
    min_octave = tl.where(top_h, MIN_OCTAVE_TOP_H, min_octave)
    cell_bits = tl.where(adaptive, CELL_BITS_ADAPTIVE, CELL_BITS_EM_INF)
    hottest = tl.maximum(tl.load(p + tl.where(top_h, TEMPERATURE, MAX_TEMPERATURE)), 1.0)
    cutoff = -MIN_EXP_ARGUMENT * hottest
    return (
        tl.where(adaptive, 0.0, mean),
        min_octave,
        cell_bits,
        tl.where(adaptive, tl.where(top_h, tl.minimum(cutoff, MAX_CUTOFF_TOP_H), cutoff), CUTOFF_NATS_EM_INF),
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
def histogram_kernel(
    logits_ptr, row_stride, params_ptr, scalars_ptr, active_ptr, counts_ptr, heavy_ptr, heavy_counts_ptr,
    heavy_from_ptr,
    VOCAB: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Add the chunks of active rows to their histograms, and list their heavy logits, in the order of the vocabulary.

    The programs share the chunks. The histogram consists of integers: the order of the additions changes nothing. If a
    chunk has more heavy logits than slots, those below a higher bound go into the histogram: the bound doubles until
    the others fit.
    """
    for task in range(tl.program_id(0), tl.load(active_ptr) * SPLITS, tl.num_programs(0)):
        row, split = tl.load(active_ptr + 1 + task // SPLITS).to(tl.int64), task % SPLITS
        logits, p = logits_ptr + row * row_stride, params_ptr + row * COLUMNS
        scalars, counts = scalars_ptr + row * SCALARS, counts_ptr + row * CELLS
        if tl.load(p + METHOD) < P_LESS:
            heavies, bound = _count_chunk(
                logits, split * CHUNK, p, scalars, counts, heavy_ptr + row * HEAVY + split * SLOTS, VOCAB, SLOTS
            )
            tl.store(heavy_counts_ptr + row * SPLITS + split, heavies)
            tl.store(heavy_from_ptr + row * SPLITS + split, bound)
        elif tl.load(p + METHOD) == TOP_H:  # the others know their bound
            for part in range(0, CHUNK, PART):
                below = _load_below(logits, split * CHUNK + part, scalars, VOCAB, PART)
                _count(below, below <= 0, p, scalars, counts)


@triton.jit
def _count_chunk(logits, start, p, scalars, counts, heavy_ptr, VOCAB: tl.constexpr, SLOTS: tl.constexpr):
    """Count one chunk, list its heavy logits; return (how many, the bound from which on they are heavy)."""
    heavy_from = tl.load(scalars + HEAVY_FROM)
    heavies = 0
    for part in range(0, CHUNK, PART):
        below = _load_below(logits, start + part, scalars, VOCAB, PART)
        heavy = tl.sum((below >= heavy_from).to(tl.int32))
        _count(below, below < heavy_from, p, scalars, counts)
        if (heavy > 0) & (heavies + heavy <= SLOTS):
            _list_heavy(logits, start + part, PART, heavies, heavy_from, p, scalars, heavy_ptr, VOCAB)
        heavies += heavy
    bound = heavy_from
    if heavies > SLOTS:
        while heavies > SLOTS:
            bound += LOG_2
            heavies = 0
            for part in range(0, CHUNK, PART):
                below = _load_below(logits, start + part, scalars, VOCAB, PART)
                heavies += tl.sum((below >= bound).to(tl.int32))
        for part in range(0, CHUNK, PART):
            below = _load_below(logits, start + part, scalars, VOCAB, PART)
            _count(below, (below >= heavy_from) & (below < bound), p, scalars, counts)
        _list_heavy(logits, start, CHUNK, 0, bound, p, scalars, heavy_ptr, VOCAB)
    return heavies, bound


@triton.jit
def _list_heavy(logits, start, size, first, bound, p, scalars, heavy_ptr, VOCAB: tl.constexpr):
    """List those of `size` logits that are heavy by this bound, in slots from the `first` on.

    They are read again, in smaller parts: kept in registers, they would take the place of other programs.
    """
    centre, _, _, _ = _lay_out_cells(p, scalars)
    slot = tl.full([], first, tl.int32)
    for part in range(0, size, LIST_PART):
        token = start + part + tl.arange(0, LIST_PART)
        below = _load_below(logits, start + part, scalars, VOCAB, LIST_PART)
        heavy = (below >= bound).to(tl.int32)
        tl.store(heavy_ptr + slot + tl.cumsum(heavy) - 1, _pack(below - centre, token), mask=heavy > 0)
        slot += tl.sum(heavy)


@triton.jit
def _load_below(logits, start, scalars, VOCAB: tl.constexpr, SIZE: tl.constexpr):
    """Return the logits of SIZE tokens from `start` on, relative to the row's peak."""
    token = start + tl.arange(0, SIZE)
    return tl.load(logits + token, mask=token < VOCAB, other=-float("inf")) - tl.load(scalars + PEAK)


@triton.jit
def _count(below, counted, p, scalars, counts):
    """Add those logits of `below`, relative to the peak, that are `counted` and within the cutoff to a histogram."""
    centre, min_octave, cell_bits, cutoff = _lay_out_cells(p, scalars)
    cell, position = _find_cell(below - centre, min_octave, cell_bits)
    one = (tl.full(below.shape, 1, tl.int64) << COUNT_SHIFT) + position
    tl.atomic_add(counts + cell, one, mask=counted & (below > -cutoff), sem="relaxed")


@triton.jit
def _pack(upper, lower):
    """Pack a float32 and an int32 into one int64."""
    return (upper.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (lower.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _unpack(packed):
    """Return (upper float32, lower int32) of `_pack`."""
    return (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True), packed.to(tl.int32)


@triton.jit
def _find_particles(
    counts, heavy_counts, order, lowest, min_octave, cell_bits,
    SPLITS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Store the row's particles in `order`, without gaps, and return their number.

    A particle is a cell, by its number, or a heavy logit: CELLS + its slot. An empty cell is one only below `lowest`:
    logits there were not counted, but they move.
    """
    k = tl.arange(0, CELLS)
    outer = (((min_octave + 127) << 23) + (((k & (CELLS_PER_SIGN - 1)) + 1) << cell_bits)).to(tl.float32, bitcast=True)
    used = (tl.load(counts + k) > 0) | ((k >= CELLS_PER_SIGN) & (outer >= -lowest))
    tl.store(order + tl.cumsum(used.to(tl.int32)) - 1, k, mask=used)
    cells = tl.sum(used.to(tl.int32))
    slot = tl.arange(0, HEAVY)
    split = slot // SLOTS
    used = slot - split * SLOTS < tl.load(heavy_counts + split, mask=split < SPLITS, other=0)
    heavies = tl.sum(used.to(tl.int32))
    if heavies > 0:
        tl.store(order + cells + tl.cumsum(used.to(tl.int32)) - 1, slot + CELLS, mask=used)
    return cells + heavies


@triton.jit
def _read_particles(counts, heavy, order, particles, min_octave, cell_bits, WIDTH: tl.constexpr):
    """Return (number in the order, count, mean x, width, token) of each particle; count 0 for those that are missing.

    An empty cell has its midpoint. A heavy logit has no width. The token is -1 for a cell.
    """
    i = tl.arange(0, WIDTH)
    number = tl.load(order + i, mask=i < particles, other=0)
    is_cell = (i < particles) & (number < CELLS)
    is_heavy = (i < particles) & (number >= CELLS)
    packed = tl.load(counts + number, mask=is_cell, other=0)
    n = (packed >> COUNT_SHIFT).to(tl.float32)
    position = (packed & POSITION_MASK).to(tl.float32) / tl.maximum(n, 1.0) / _power_of_2(cell_bits)
    k = number & (CELLS_PER_SIGN - 1)
    bits = ((min_octave + 127) << 23) + (k << cell_bits)
    low, high = bits.to(tl.float32, bitcast=True), (bits + (1 << cell_bits)).to(tl.float32, bitcast=True)
    low = tl.where(k == 0, 0.0, low)
    size = low + (high - low) * tl.where(n > 0, position, 0.5)
    x = tl.where(number < CELLS_PER_SIGN, size, -size)
    exact, token = _unpack(tl.load(heavy + number - CELLS, mask=is_heavy, other=0))
    n = tl.where(is_heavy, 1.0, n)
    return number, n, tl.where(is_heavy, exact, x), tl.where(is_heavy, 0.0, high - low), tl.where(is_heavy, token, -1)


@triton.jit
def _cell_variance(n, x, z, width, on_grid):
    """Return the variance of x within each cell. The logits z of a cell are assumed to be spread evenly.

    With `on_grid`, over the values that bfloat16 can represent there; without it, over the complete cell. It is 0 if
    all logits of the cell are equal.
    """
    exponent = (z.to(tl.int32, bitcast=True) >> 23) & 0xFF
    spacing = tl.where(exponent > 7, _power_of_2(exponent - 127 - 7), 0.0) * on_grid
    return tl.where(n > 1, tl.maximum(width * width - spacing * spacing, 0.0) / 12, 0.0)


@triton.jit
def _sum_cells(x, slope, n, variance):
    """Return (top, total, mean, e) of cells at x: maximum, sum of n * e, mean of x - top, and e = exp(x - top).

    The variance within each cell enters the sums to second order; `slope` says how the cell was stretched.
    """
    top = tl.max(tl.where(n > 0, x, LOWEST_LOGIT))
    below = tl.minimum(tl.maximum(x - top, MIN_EXP_ARGUMENT), 0.0)
    e = tl.where(x - top > MAX_ABOVE_TOP, 0.0, tl.exp(below))
    spread = tl.where(n < MIN_SPREAD_COUNT, 0.0, tl.minimum(slope * slope * variance, MAX_CELL_VARIANCE))
    weight = tl.where(n > 0, n * e, 0.0)
    total = tl.sum(weight * (1 + spread / 2))
    moment = tl.sum(tl.where(n > 0, weight * (below * (1 + spread / 2) + spread), 0.0))
    return top, total, moment / total, e


@triton.jit
def solve_kernel(
    logits_ptr, row_stride, params_ptr, scalars_ptr, counts_ptr, heavy_ptr, heavy_counts_ptr, heavy_from_ptr,
    order_ptr, particle_counts_ptr, moves_ptr, history_ptr, stats_ptr, stats_stride,
    VOCAB: tl.constexpr, SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store an active row's stats, how far each heavy logit moves, and what becomes of the logits of each cell.

    Launched with two widths: the narrow one finds the particles and solves for a row with at most NARROW of them, the
    wide one for other rows. A row whose solve is in doubt is solved again by the wide one, logit by logit.
    """
    row = tl.program_id(0).to(tl.int64)
    p, scalars = params_ptr + row * COLUMNS, scalars_ptr + row * SCALARS
    if tl.load(scalars + ACTIVE) == 0:
        return
    centre, min_octave, cell_bits, cutoff = _lay_out_cells(p, scalars)
    counts, heavy, order = counts_ptr + row * CELLS, heavy_ptr + row * HEAVY, order_ptr + row * PARTICLES
    if tl.load(p + METHOD) >= P_LESS:
        logits = logits_ptr + row * row_stride
        if WIDTH != NARROW:
            _measure_kept(logits, scalars, stats_ptr + row, stats_stride, VOCAB)
        elif tl.load(p + METHOD) == TOP_H:
            tl.store(scalars + LOWEST, _find_lowest(logits, p, scalars, counts, VOCAB))
        return
    if WIDTH == NARROW:
        # Adaptive temperature scales all logits alike: it needs no moves of cells.
        lowest = tl.where(tl.load(p + METHOD) == ADAPTIVE_TEMPERATURE, -float("inf"), -cutoff - centre)
        particles = _find_particles(
            counts, heavy_counts_ptr + row * SPLITS, order, lowest, min_octave, cell_bits, SPLITS, SLOTS
        )
        tl.store(particle_counts_ptr + row, particles)
        tl.debug_barrier()  # others of this program's threads read what one has written
        if particles > NARROW:
            return
    else:
        particles = tl.load(particle_counts_ptr + row)
        if particles <= NARROW:
            return
    history, stats = history_ptr + row * HISTORY * STEP_SCALARS, stats_ptr + row
    h = tl.load(scalars + ENTROPY)
    doubt = MAX_DOUBT * 2
    if particles != DOUBTFUL:
        number, n, x, width, token = _read_particles(counts, heavy, order, particles, min_octave, cell_bits, WIDTH)
        on_grid = tl.where(tl.load(scalars + OFF_GRID) < 0, 1.0, 0.0)
        variance = _cell_variance(n, x, x + centre + tl.load(scalars + PEAK), width, on_grid)
        if tl.load(p + METHOD) == ADAPTIVE_TEMPERATURE:
            t, reached = _temperature(p, n, x, variance, h)
            tl.store(history, t)
            _store_stats(stats, stats_stride, h, reached, 1)
            return
        moved, move, reached, taken, doubt = _descend(
            p, n, x, width, variance, tl.load(scalars + TOTAL), centre, h, history, WIDTH
        )
        tl.store(moves_ptr + row * CELLS + number, move, mask=(tl.arange(0, WIDTH) < particles) & (token < 0))
        tl.store(heavy + number - CELLS, _pack(moved, token), mask=token >= 0)
        _store_stats(stats, stats_stride, h, reached, taken)
    if doubt > MAX_DOUBT:
        if WIDTH == NARROW:
            tl.store(particle_counts_ptr + row, DOUBTFUL)
        else:
            logits = logits_ptr + row * row_stride
            reached, taken = _descend_exactly(logits, tl.load(scalars + PEAK), centre, p, h, history, VOCAB)
            _store_stats(stats, stats_stride, h, reached, taken)
            # `apply_kernel` is to retrace every logit: none is heavy, none has its cell's mean.
            split = row * SPLITS + tl.arange(0, SPLITS_POW2)
            mask = tl.arange(0, SPLITS_POW2) < SPLITS
            tl.store(heavy_counts_ptr + split, tl.zeros([SPLITS_POW2], tl.int32), mask=mask)
            tl.store(heavy_from_ptr + split, tl.full([SPLITS_POW2], float("inf"), tl.float32), mask=mask)
            nowhere = _pack(tl.full([CELLS], float("inf"), tl.float32), tl.full([CELLS], 1, tl.int32))
            tl.store(moves_ptr + row * CELLS + tl.arange(0, CELLS), nowhere)


@triton.jit
def _descend(p, n, x, width, variance, total, centre, h, history_ptr, WIDTH: tl.constexpr):
    """Apply EM-INF to particles; return (how far each moved, its packed move, entropy, steps, doubt).

    x and its derivative `slope` with respect to the logit go through the same steps. The origin of x is the row's mean.
    The first step has the row's exact sums, which were taken over the logits themselves. Every step's scalars are
    stored.

    A packed move is for `apply_kernel`: how far a logit at x = 0 would move, and what x adds to it (the tangent). If
    the lowest bit of the move is set, the tangent does not fit: the move is that of a logit at the cell's mean, and the
    other number is this mean. Logits elsewhere in the cell are retraced one by one.

    The row's sums took all logits of such a cell to be at its mean. The doubt says how much of the row is concerned:
    the probability that two tokens come from one such cell, before or after the steps, unless its logits are equal and
    their mean, a sum of positions, is as good as exact.
    """
    threshold, steps = tl.load(p + THRESHOLD), tl.load(p + STEPS)
    rate, kl, adam = tl.load(p + LEARNING_RATE), tl.load(p + KL_WEIGHT), tl.load(p + ADAM)
    x0 = x
    slope = tl.full([WIDTH], 1.0, tl.float32)
    m, v = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    dm, dv = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    broken = tl.zeros([WIDTH], tl.int32)
    top, share, mean = -centre, 1.0 / total, centre
    e = tl.where(x - top > MAX_ABOVE_TOP, 0.0, tl.exp(tl.minimum(tl.maximum(x - top, MIN_EXP_ARGUMENT), 0.0)))
    p0 = e * share
    decay1, decay2 = 1.0, 1.0
    taken = 0
    while (taken < steps) & (h >= threshold):
        tl.store(history_ptr + taken * STEP_SCALARS, top)
        tl.store(history_ptr + taken * STEP_SCALARS + 1, share)
        tl.store(history_ptr + taken * STEP_SCALARS + 2, mean)
        q = e * share
        c = (x - top) - mean
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
    is_faint = tl.maximum(p0, e * share) < FAINT
    most = tl.where(is_faint, MAX_FAINT_TANGENT_MOVE, MAX_TANGENT_MOVE)
    broken = tl.where(n == 1, 0, tl.where(tl.abs(tangent) * width > most, 1, broken))
    move = tl.where(broken > 0, x - x0, x - x0 - tangent * x0)
    flagged = (move.to(tl.int32, bitcast=True) & -2) | broken
    uncertain = (broken > 0) & ((variance > 0) | ((tl.abs(slope) > MAX_EXACT_SLOPE) & (width > MIN_WIDTH)))
    doubtful = tl.where(uncertain, n * tl.maximum(p0, e * share), 0.0)
    return x - x0, _pack(tl.where(broken > 0, x0, tangent), flagged), h, taken, tl.sum(doubtful * doubtful)


@triton.jit
def _descend_exactly(logits, peak, centre, p, h, history_ptr, VOCAB: tl.constexpr):
    """Apply EM-INF to every logit of a row by itself; return (entropy, steps).

    Takes the steps of `_descend`, whose scalars of the first step it needs. No memory holds what becomes of a logit:
    each is retraced at every step, so that the time grows with the square of the steps. Few rows need it.
    """
    threshold, steps = tl.load(p + THRESHOLD), tl.load(p + STEPS)
    taken = 0
    while (taken < steps) & (h >= threshold):
        taken += 1
        # In each column of the row, as chunks lie below one another.
        top = tl.full([CHUNK], LOWEST_LOGIT, tl.float32)
        total, moment = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
        for start in range(0, VOCAB, CHUNK):
            at = start + tl.arange(0, CHUNK)
            below = tl.load(logits + at, mask=at < VOCAB, other=-float("inf")) - peak
            counted = below - centre > MIN_EXP_ARGUMENT
            x = tl.maximum(below - centre, MIN_EXP_ARGUMENT)
            x += _retrace(x, p, history_ptr, taken)
            fall = tl.maximum(top - tl.maximum(top, x), MIN_EXP_ARGUMENT)
            shrink = tl.exp(fall)
            moment = (moment + total * fall) * shrink
            total *= shrink
            top = tl.maximum(top, x)
            below = tl.maximum(x - top, MIN_EXP_ARGUMENT)
            e = tl.where(counted, tl.exp(below), 0.0)
            total += e
            moment += e * below
        highest = tl.max(top)
        fall = tl.maximum(top - highest, MIN_EXP_ARGUMENT)
        sums = tl.sum(total * tl.exp(fall))
        mean = tl.sum((moment + total * fall) * tl.exp(fall)) / sums
        h = tl.maximum(tl.log(sums) - mean, 0.0)
        if taken < steps:
            tl.store(history_ptr + taken * STEP_SCALARS, highest)
            tl.store(history_ptr + taken * STEP_SCALARS + 1, 1.0 / sums)
            tl.store(history_ptr + taken * STEP_SCALARS + 2, mean)
        tl.debug_barrier()  # others of this program's threads read what one has written
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
def apply_kernel(
    logits_ptr, row_stride, params_ptr, scalars_ptr, active_ptr, heavy_ptr, heavy_counts_ptr, heavy_from_ptr,
    moves_ptr, history_ptr, stats_ptr, stats_stride,
    VOCAB: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Store the new logits of active rows. The programs share the chunks."""
    for task in range(tl.program_id(0), tl.load(active_ptr) * SPLITS, tl.num_programs(0)):
        row, split = tl.load(active_ptr + 1 + task // SPLITS).to(tl.int64), task % SPLITS
        p, logits = params_ptr + row * COLUMNS, logits_ptr + row * row_stride
        history = history_ptr + row * HISTORY * STEP_SCALARS
        if tl.load(p + METHOD) == ADAPTIVE_TEMPERATURE:
            _divide_chunk(logits, split * CHUNK, tl.load(history), VOCAB)
        elif tl.load(p + METHOD) >= P_LESS:
            _cut_chunk(logits, split * CHUNK, scalars_ptr + row * SCALARS, VOCAB)
        else:
            _move_chunk(
                logits, split * CHUNK, p, scalars_ptr + row * SCALARS, heavy_ptr + row * HEAVY + split * SLOTS,
                tl.load(heavy_counts_ptr + row * SPLITS + split), tl.load(heavy_from_ptr + row * SPLITS + split),
                moves_ptr + row * CELLS, history, tl.load(stats_ptr + 3 * stats_stride + row), VOCAB, SLOTS,
            )  # fmt: skip


@triton.jit
def _divide_chunk(logits, start, temperature, VOCAB: tl.constexpr):
    """Divide the logits of one chunk by a temperature."""
    for part in range(0, CHUNK, PART):
        at = start + part + tl.arange(0, PART)
        z = tl.load(logits + at, mask=at < VOCAB, other=0.0)
        tl.store(logits + at, tl.div_rn(z, temperature), mask=at < VOCAB)


@triton.jit
def _cut_chunk(logits, start, scalars, VOCAB: tl.constexpr):
    """Remove those logits of one chunk that are below the row's bound."""
    lowest = tl.load(scalars + LOWEST)
    for part in range(0, CHUNK, PART):
        at = start + part + tl.arange(0, PART)
        below = _load_below(logits, start + part, scalars, VOCAB, PART)
        tl.store(logits + at, tl.full([PART], -float("inf"), tl.float32), mask=(at < VOCAB) & (below < lowest))


@triton.jit
def _measure_kept(logits, scalars, stats, stats_stride, VOCAB: tl.constexpr):
    """Store the stats of a row from which a method removes tokens. The row is as it was before."""
    lowest, h = tl.load(scalars + LOWEST), tl.load(scalars + ENTROPY)
    total, moment, cut = 0.0, 0.0, 0
    for start in range(0, VOCAB, CHUNK):
        below = _load_below(logits, start, scalars, VOCAB, CHUNK)
        y = tl.maximum(below, MIN_EXP_ARGUMENT)
        e = tl.where((below >= lowest) & (below > MIN_EXP_ARGUMENT), tl.exp(y), 0.0)
        total += tl.sum(e)
        moment += tl.sum(e * y)
        cut += tl.sum(((below < lowest) & (below > -float("inf"))).to(tl.int32))
    after = tl.where(cut > 0, tl.maximum(tl.log(total) - moment / total, 0.0), h)
    _store_stats(stats, stats_stride, h, after, tl.where(cut > 0, CUT, 0))


@triton.jit
def _find_lowest(logits, p, scalars, counts, VOCAB: tl.constexpr):
    """Return how far below the peak top_h keeps tokens: the lowest of the longest prefix of its LIMIT; -inf for all.

    The entropy of a prefix of the sorted tokens rises with its length. The histogram shows the cell in which it passes
    the limit. The logits of this cell are counted again, by parts of the cell, and those nearer to the peak are added
    up by themselves: with these sums, the limit may turn out to be passed in the cell before or after.
    """
    cold, limit, peak = 1 / tl.load(p + TEMPERATURE), tl.load(scalars + LIMIT), tl.load(scalars + PEAK)
    on_grid = tl.where(tl.load(scalars + OFF_GRID) < 0, 1.0, 0.0)
    k = tl.arange(0, CELLS_PER_SIGN)
    nearest = (MIN_OCTAVE_TOP_H + 127) << 23  # the bits of the first cell's least distance from the peak
    n, x, width = _read_cells(tl.load(counts + CELLS_PER_SIGN + k), nearest + k * CELL_NUMBERS, CELL_NUMBERS)
    tops = (tl.load(counts) >> COUNT_SHIFT).to(tl.float32)
    cell, above, above_moment = _pass_limit(
        n, x, _cell_variance(n, -x, peak - x, width, on_grid), cold, tops, tops * 0.0, limit
    )
    last_cell = tl.max(tl.where(n > 0, k, -1))
    cell = tl.minimum(cell, last_cell)
    lowest = tl.full([], -float("inf"), tl.float32)
    went_on, searching = 0, last_cell >= 0
    while searching:
        first = nearest + cell * CELL_NUMBERS
        total, moment = _count_again(logits, scalars, counts, cold, first, CELL_NUMBERS, PART_NUMBERS, VOCAB)
        part = tl.arange(0, CELLS)
        parts, distance, _width = _read_cells(tl.load(counts + part), first + part * PART_NUMBERS, PART_NUMBERS)
        found, above, above_moment = _pass_limit(parts, distance, parts * 0.0, cold, total, moment, limit)
        before = tl.max(tl.where((n > 0) & (k < cell), k, -1))
        after = tl.min(tl.where((n > 0) & (k > cell), k, CELLS_PER_SIGN))
        if tl.log(total) - moment / total > limit:
            # Passed before this cell; after going on, between this cell and the one before.
            searching = (went_on == 0) & (before >= 0)
            lowest = -(first - 1).to(tl.float32, bitcast=True)
            cell = before
        elif found == CELLS:
            searching = after < CELLS_PER_SIGN
            lowest = tl.full([], -float("inf"), tl.float32)
            cell, went_on = after, 1
        else:
            first += found * PART_NUMBERS
            lowest = _find_lowest_in_part(logits, scalars, counts, cold, first, above, above_moment, limit, VOCAB)
            searching = cell < 0  # false: it is found
    return lowest


@triton.jit
def _find_lowest_in_part(logits, scalars, counts, cold, first, total, moment, limit, VOCAB: tl.constexpr):
    """Return the lowest z - peak in a part of a cell, from `first` on, that belongs to the prefix.

    `total` and `moment` are of the tokens above the part. If none of the part's belongs to the prefix, returns a number
    between these and those. One of several equal tokens within the limit is enough: all of them stay.
    """
    _, _ = _count_again(logits, scalars, counts, cold, first, PART_NUMBERS, 1, VOCAB)
    number = tl.arange(0, PART_NUMBERS)
    n, x, _ = _read_cells(tl.load(counts + number), first + number, 1)
    y = tl.maximum(-x * cold, MIN_EXP_ARGUMENT)
    e = tl.exp(y)
    weight = n * e
    s = total + tl.cumsum(weight) - weight + e
    m = moment + tl.cumsum(weight * y) - weight * y + e * y
    last = tl.max(tl.where((n > 0) & (tl.log(s) - m / s <= limit), number, -1))
    return -(first + last).to(tl.float32, bitcast=True)


@triton.jit
def _read_cells(packed, first, NUMBERS: tl.constexpr):
    """Return (count, mean distance from the peak, width) of cells of so many neighbouring numbers from `first` on."""
    n = (packed >> COUNT_SHIFT).to(tl.float32)
    position = (packed & POSITION_MASK).to(tl.float32) / tl.maximum(n, 1.0) / NUMBERS
    low, high = first.to(tl.float32, bitcast=True), (first + NUMBERS).to(tl.float32, bitcast=True)
    return n, low + (high - low) * position, high - low


@triton.jit
def _count_again(
    logits, scalars, counts, cold, first, NUMBERS: tl.constexpr, PART: tl.constexpr, VOCAB: tl.constexpr
):  # fmt: skip
    """Count those logits of a row whose distance from the peak is among so many numbers from `first` on.

    Each PART of these numbers has a cell, the first of them cell 0. Returns (the sum of exp(y) over the logits that are
    nearer to the peak, its first moment), with y their z - peak times `cold`.
    """
    total, moment = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)  # by place in a chunk
    tl.debug_barrier()  # until all threads of this program have read the counts
    tl.store(counts + tl.arange(0, CELLS), tl.zeros([CELLS], tl.int64))
    tl.debug_barrier()
    for start in range(0, VOCAB, CHUNK):
        below = _load_below(logits, start, scalars, VOCAB, CHUNK)
        place = (below.to(tl.int32, bitcast=True) & 0x7FFFFFFF) - first
        one = (tl.full([CHUNK], 1, tl.int64) << COUNT_SHIFT) + (place & (PART - 1))
        inside = (below < 0) & (place >= 0) & (place < NUMBERS)
        tl.atomic_add(counts + place // PART, one, mask=inside, sem="relaxed")
        y = tl.maximum(below * cold, MIN_EXP_ARGUMENT)
        e = tl.where(place < 0, tl.exp(y), 0.0)
        total += e
        moment += e * y
    tl.debug_barrier()
    return tl.sum(total), tl.sum(moment)


@triton.jit
def _pass_limit(n, x, variance, cold, total, moment, limit):
    """Add cells of n logits at a distance x from the peak to a total and its moment, in order, up to a limit in nats.

    Returns (the first cell with which the entropy is above the limit, or how many there are; total and moment before).
    """
    y = tl.maximum(-x * cold, MIN_EXP_ARGUMENT)
    spread = tl.where(n < MIN_SPREAD_COUNT, 0.0, tl.minimum(cold * cold * variance, MAX_CELL_VARIANCE))
    weight = n * tl.exp(y) * (1 + spread / 2)
    moments = weight * y + n * tl.exp(y) * spread
    s, m = total + tl.cumsum(weight), moment + tl.cumsum(moments)
    k = tl.arange(0, n.shape[0])
    cell = tl.min(tl.where(tl.log(s) - m / s > limit, k, n.shape[0]))
    before = k < cell
    return cell, total + tl.sum(tl.where(before, weight, 0.0)), moment + tl.sum(tl.where(before, moments, 0.0))


@triton.jit
def _move_chunk(
    logits, start, p, scalars, heavy_ptr, heavies, heavy_from, moves, history, taken,
    VOCAB: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Move the logits of one chunk, its heavy ones each by their own move."""
    for part in range(0, CHUNK, PART):
        at = start + part + tl.arange(0, PART)
        mask = at < VOCAB
        z = tl.load(logits + at, mask=mask, other=-float("inf"))
        below = z - tl.load(scalars + PEAK)
        moved = _find_moves(below, mask, p, scalars, moves, history, taken)
        tl.store(logits + at, z + moved, mask=mask & (below < heavy_from))
    if heavies > 0:
        slot = tl.arange(0, SLOTS)
        heavy_move, token = _unpack(tl.load(heavy_ptr + slot, mask=slot < heavies, other=0))
        before = tl.load(logits + token, mask=slot < heavies, other=0.0)
        tl.debug_barrier()  # until all threads of this program have read these logits
        tl.store(logits + token, before + heavy_move, mask=slot < heavies)


@triton.jit
def _find_moves(below, mask, p, scalars, moves, history, taken):
    """Return how far logits move, given relative to the row's peak, by the tangent of their cell or retraced."""
    centre, min_octave, cell_bits, _ = _lay_out_cells(p, scalars)
    x = below - centre
    cell, _ = _find_cell(x, min_octave, cell_bits)
    near = mask & (x > -_power_of_2(min_octave + OCTAVES_EM_INF))  # further down nothing moves
    other, flagged = _unpack(tl.load(moves + cell, mask=near, other=0))
    move, broken = (flagged & -2).to(tl.float32, bitcast=True), (flagged & 1) != 0
    moved = tl.where(near, tl.where(broken, move, move + other * x), 0.0)
    retraced = near & broken & (tl.abs(x - other) > SAME_X * tl.abs(x))
    if tl.max(retraced.to(tl.int32)) > 0:
        moved = tl.where(retraced, _retrace(x, p, history, taken), moved)
    return moved


@triton.jit
def _retrace(x0, p, history_ptr, taken):
    """Return how far logits at x0 move, exactly, from the row's scalars of every step. Few logits need it."""
    rate, kl, adam = tl.load(p + LEARNING_RATE), tl.load(p + KL_WEIGHT), tl.load(p + ADAM)
    x = tl.maximum(x0, MIN_EXP_ARGUMENT)
    start = x
    m, v, p0 = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    decay1, decay2 = 1.0, 1.0
    for step in range(taken):
        top, share, mean = (
            tl.load(history_ptr + step * STEP_SCALARS),
            tl.load(history_ptr + step * STEP_SCALARS + 1),
            tl.load(history_ptr + step * STEP_SCALARS + 2),
        )
        q = tl.exp(tl.minimum(tl.maximum(x - top, MIN_EXP_ARGUMENT), 0.0)) * share
        p0 = tl.where(step == 0, q, p0)
        g = kl * (q - p0) - q * ((x - top) - mean)
        if adam != 0:
            decay1 *= BETA1
            decay2 *= BETA2
            m = BETA1 * m + (1 - BETA1) * g
            v = BETA2 * v + (1 - BETA2) * g * g
            x -= rate / (1 - decay1) * m / (tl.sqrt(v / (1 - decay2)) + EPSILON)
        else:
            x -= rate * g
    return x - start
