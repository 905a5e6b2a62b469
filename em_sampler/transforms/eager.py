"""The eager transform: a batch of rows in plain torch, on any device, each row with its own method and params.

Closed-form gradients: no autograd, no loop over rows. It stands in if a device's fast implementation does not work.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from em_sampler.params import CUT, MAX_TEMPERATURE, MIN_TEMPERATURE, Params
from em_sampler.transforms.batch import MASKED_LOGIT, BatchParams, Column, Method, TransformOutput, check_batch
from em_sampler.transforms.reference import BETA1, BETA2, EPSILON

# A batch is processed in chunks of rows. A chunk has at most this many logits: few enough for a CPU's outermost cache,
# enough to fill a GPU.
CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**23}
BUFFERS = 7  # tensors of a chunk's shape in the workspace

# Enough bisections to shrink the widest range of temperatures to 1e-3 relative; Newton's steps refine the result. The
# number is the same for every row, because a row's result must not depend on the range of its neighbours.
BISECTIONS = math.ceil(math.log2(math.log(MAX_TEMPERATURE / MIN_TEMPERATURE) / 1e-3))
NEWTON_STEPS = 2


def transform(
    logits: Tensor, params: Sequence[Params | None], temperatures: Sequence[float] | None = None
) -> TransformOutput:
    """Apply each row's method to `logits`, in place and always by the eager implementation.

    Arguments, errors and source are those of `em_sampler.transforms.dispatch.transform`.
    """
    check_batch(logits, params, temperatures)
    eager = EagerTransform(logits.shape[1], logits.device, max_rows=logits.shape[0])
    return eager(logits, BatchParams.of(params, logits.device, temperatures))


class EagerTransform:
    """The eager implementation, with a workspace that is allocated once."""

    name = "eager"

    def __init__(self, vocab_size: int, device: torch.device, max_rows: int) -> None:
        self.chunk_rows = max(1, min(max_rows, CHUNK_LOGITS.get(device.type, 2**23) // max(vocab_size, 1)))
        self.buffers = torch.empty(BUFFERS, self.chunk_rows, vocab_size, dtype=torch.float32, device=device)
        # On the CPU, rows with nothing to do are skipped. Elsewhere, asking which rows these are would wait for the
        # device: all rows are computed, and those rows are masked.
        self.skip_idle_rows = device.type == "cpu"

    @torch.no_grad()
    def __call__(self, logits: Tensor, params: BatchParams) -> TransformOutput:
        """Transform `logits` [rows, vocab] float32 in place, row i by row i of `params`."""
        method, threshold = params[Column.METHOD].squeeze(1), params[Column.THRESHOLD].squeeze(1)
        before, varentropy = self._measure(logits, method != Method.OFF)
        varentropy.masked_fill_(params[Column.STATS].squeeze(1) == 0, math.nan)
        after = before.clone()
        steps = torch.zeros(len(before), dtype=torch.int32, device=logits.device)
        if params.max_steps:
            active = (method == Method.EM_INF) & (before >= threshold)
            for rows in self._chunks(active):
                h, steps[rows] = self._descend(logits, rows, active[rows], params.select(rows))
                after[rows] = torch.where(active[rows], h, after[rows])
        if "adaptive_temperature" in params.methods:
            active = (method == Method.ADAPTIVE_TEMPERATURE) & (before > threshold)
            for rows in self._chunks(active):
                h = self._adaptive_temperature(logits, rows, active[rows], params.select(rows), before[rows])
                after[rows] = torch.where(active[rows], h, after[rows])
            steps += active
        if params.methods & _KEPT.keys():
            active = (method >= Method.P_LESS) & ~before.isnan()
            for rows in self._chunks(active):
                h, cut = self._truncate(logits, rows, active[rows], params.select(rows))
                after[rows] = torch.where(cut, h, after[rows])
                steps[rows] = torch.where(cut, CUT, steps[rows])
        return TransformOutput.of(logits, before, after, varentropy, steps)

    def _chunks(self, wanted: Tensor) -> tuple[Tensor, ...]:
        """Return the numbers (int64) of the rows to compute, in chunks that fit the workspace."""
        rows = wanted.nonzero().squeeze(1) if self.skip_idle_rows else torch.arange(len(wanted), device=wanted.device)
        return torch.split(rows, self.chunk_rows) if len(rows) else ()

    def _measure(self, logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the entropy and the varentropy [rows] of every row that is wanted, and NaN for the others."""
        results = torch.full((2, len(wanted)), math.nan, dtype=torch.float32, device=logits.device)
        for rows in self._chunks(wanted):
            z, c, p, pc = self.buffers[:4, : len(rows)]
            torch.index_select(logits, 0, rows, out=z)
            h = softmax_entropy(_below_peak(z, out=c), p, pc)
            c.sub_(pc.sum(1, keepdim=True))
            variance = p.mul_(c).mul_(c).sum(1)  # of log p, which is c less a constant
            measured = torch.stack((h.squeeze(1), variance))
            results[:, rows] = torch.where(wanted[rows], measured, math.nan)
        return results[0], results[1]

    def _descend(self, logits: Tensor, rows: Tensor, active: Tensor, params: BatchParams) -> tuple[Tensor, Tensor]:
        """Apply EM-INF to `rows`; return their entropies and steps, each [n].

        log p + H equals c = z - E_p[z], so the gradient needs no logarithm. It is exactly 0 on a uniform row: otherwise
        Adam would divide rounding noise by itself and step at random.
        """
        z, c, p, g, p0, m, v = self.buffers[:, : len(rows)]
        torch.index_select(logits, 0, rows, out=z)
        adam, rate = params[Column.ADAM], params[Column.LEARNING_RATE]
        beta1 = BETA1 * adam  # sgd is Adam without momentum whose denominator is 1
        floor = adam * EPSILON + (1 - adam)
        m.zero_()
        v.zero_()
        active = active.unsqueeze(1)
        taken = torch.zeros_like(active, dtype=torch.int32)
        for step in range(1, params.max_steps + 2):
            h = softmax_entropy(_below_peak(z, out=c), p, g)
            active = active & (h >= params[Column.THRESHOLD]) & (step <= params[Column.STEPS])
            if step > params.max_steps or (self.skip_idle_rows and not active.any()):
                break
            taken += active
            if step == 1:
                p0.copy_(p)
            c.sub_(g.sum(1, keepdim=True))
            torch.sub(p, p0, out=g).mul_(params[Column.KL_WEIGHT]).sub_(c.mul_(p))
            m.mul_(beta1).addcmul_(g, 1 - beta1)
            v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            torch.sqrt(v, out=c).mul_(adam / math.sqrt(1 - BETA2**step)).add_(floor)
            scale = torch.where(active, rate / (1 - beta1**step), 0.0)
            z.sub_(torch.div(m, c, out=c).mul_(scale))
        _write_back(logits, rows, z, taken > 0, spare=c)
        return h.squeeze(1), taken.squeeze(1)

    def _adaptive_temperature(
        self, logits: Tensor, rows: Tensor, active: Tensor, params: BatchParams, before: Tensor
    ) -> Tensor:
        """Apply adaptive temperature to `rows`; return their entropies, [n].

        H(softmax(z / T)) rises with T. Bisection on log T always ends within 1e-3 relative; Newton's steps, with
        dH / d log T = Var_p[z / T], bring the result to float32's accuracy if the curve is smooth.
        """
        z, base, c, p, pc = self.buffers[:5, : len(rows)]
        torch.index_select(logits, 0, rows, out=z)
        _below_peak(z, out=base)
        target = torch.maximum(params[Column.RATIO] * before.unsqueeze(1), params[Column.THRESHOLD])
        low, high = params[Column.MIN_TEMPERATURE].log(), params[Column.MAX_TEMPERATURE].log()

        def entropy_at(log_t: Tensor) -> Tensor:  # [n, 1]
            return softmax_entropy(torch.mul(base, (-log_t).exp(), out=c), p, pc)

        hottest = entropy_at(high) <= target
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            cold = entropy_at(middle) <= target
            low, high = torch.where(cold, middle, low), torch.where(cold, high, middle)
        log_t = low
        for _ in range(NEWTON_STEPS):
            excess = entropy_at(log_t) - target
            mean = pc.sum(1, keepdim=True)
            variance = pc.mul_(c).sum(1, keepdim=True) - mean**2
            log_t = torch.minimum(torch.maximum(log_t - excess / variance.clamp_min(1e-30), low), high)
        log_t = torch.where(hottest, params[Column.MAX_TEMPERATURE].log(), log_t)
        h = entropy_at(log_t)
        _write_back(logits, rows, z.div_(log_t.exp()), active.unsqueeze(1), spare=c)
        return h.squeeze(1)

    def _truncate(self, logits: Tensor, rows: Tensor, active: Tensor, params: BatchParams) -> tuple[Tensor, Tensor]:
        """Remove the tokens of `rows` that their methods do not keep; return (entropies, whether any was), each [n]."""
        z, c, p, pc = self.buffers[:4, : len(rows)]
        torch.index_select(logits, 0, rows, out=z)
        words = z > -math.inf
        _below_peak(z, out=c)
        softmax_entropy(torch.div(c, params[Column.TEMPERATURE].clamp_min(1e-30), out=pc), p, pc)
        kept = words
        for name in sorted(params.methods & _KEPT.keys()):
            keeps = _KEPT[name](p, z, words, params) | (c == 0)
            kept = torch.where(params[Column.METHOD] == Method[name.upper()], kept & keeps, kept)
        cut = active & (words & ~kept).any(1)
        _write_back(logits, rows, z.masked_fill_(~kept, -math.inf), cut.unsqueeze(1), spare=pc)
        h = softmax_entropy(c.masked_fill_(~kept, MASKED_LOGIT), p, pc)
        return h.squeeze(1), cut


def _kept_by_p_less(p: Tensor, z: Tensor, words: Tensor, params: BatchParams) -> Tensor:
    collision, n = (p * p).sum(1, keepdim=True), words.sum(1, keepdim=True)
    normalized = (n * collision - 1) / (n - 1).clamp_min(1)
    return p >= torch.where(params[Column.NORMALIZED] > 0, normalized, collision)


def _kept_by_top_h(p: Tensor, z: Tensor, words: Tensor, params: BatchParams) -> Tensor:
    """Sort: the entropy of the k likeliest tokens rises with k. In float64, as sums over a prefix lose digits."""
    descending = p.double().sort(1, descending=True).values
    total = descending.cumsum(1)
    entropies = total.log() - torch.xlogy(descending, descending).cumsum(1) / total
    length = (entropies <= params[Column.ALPHA] * entropies[:, -1:]).sum(1, keepdim=True)
    return p >= descending.gather(1, length.clamp_min(1) - 1)


def _kept_by_top_n_sigma(p: Tensor, z: Tensor, words: Tensor, params: BatchParams) -> Tensor:
    """In float64, as any finite number may be a logit."""
    n = words.sum(1, keepdim=True)
    below = z.double() - z.amax(1, keepdim=True)
    mean = below.masked_fill(~words, 0).sum(1, keepdim=True) / n
    variance = (below - mean).masked_fill(~words, 0).square().sum(1, keepdim=True) / n
    return below >= -params[Column.N] * variance.sqrt()


def _kept_by_greedy_below(p: Tensor, z: Tensor, words: Tensor, params: BatchParams) -> Tensor:
    return p.amax(1, keepdim=True) >= params[Column.P_MAX]


# What each truncating method keeps besides the top, [rows, vocab], of logits z and p = softmax(z / T).
_KEPT: dict[str, Callable[[Tensor, Tensor, Tensor, BatchParams], Tensor]] = {
    "p_less": _kept_by_p_less,
    "top_h": _kept_by_top_h,
    "top_n_sigma": _kept_by_top_n_sigma,
    "greedy_below": _kept_by_greedy_below,
}


def _below_peak(z: Tensor, out: Tensor) -> Tensor:
    """Return z minus its row's maximum, at least MASKED_LOGIT.

    A row with NaN becomes NaN throughout. In a row with +inf, only +inf becomes NaN.
    """
    return torch.sub(z, z.amax(1, keepdim=True), out=out).clamp_(min=MASKED_LOGIT)


def softmax_entropy(c: Tensor, p: Tensor, pc: Tensor) -> Tensor:
    """Return the entropy [rows, 1] of softmax(c) in nats; fill p = softmax(c) and pc = p * c. All of c is at most 0."""
    total = torch.exp(c, out=p).sum(1, keepdim=True)
    p.div_(total)
    return total.log() - torch.mul(p, c, out=pc).sum(1, keepdim=True)


def _write_back(logits: Tensor, rows: Tensor, z: Tensor, changed: Tensor, spare: Tensor) -> None:
    """Copy those rows of z that `changed` ([n, 1]) into `logits`; the other rows keep every bit."""
    torch.index_select(logits, 0, rows, out=spare)
    logits.index_copy_(0, rows, torch.where(changed, z, spare, out=spare))
