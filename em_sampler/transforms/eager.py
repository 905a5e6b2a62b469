"""The transform for a batch: rows x vocabulary in torch, on any device, each row with its own method and parameters.

Knows nothing of requests or vLLM. Closed-form gradients; no autograd, no loop over rows, nothing kept between calls.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from em_sampler.params import MAX_TEMPERATURE, MIN_TEMPERATURE, Params
from em_sampler.transforms.batch import ADAPTIVE, EM_INF, NO_METHOD, BatchParams, TransformOutput, check_batch
from em_sampler.transforms.reference import BETA1, BETA2, EPSILON

# A batch is done in chunks of rows that fit a workspace of BUFFERS x this many float32: small enough for a CPU's outer
# cache, large enough to fill a GPU.
BUFFERS = 7
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**23}

# A logit this far below its row's maximum has probability 0 in float32 at every temperature allowed: exp(-1e6 / 10).
# Standing in for -inf, it keeps 0 * -inf out of the sums.
FLOOR = -1e6

# Enough for the widest range of temperatures to shrink to 1e-3 relative; Newton's steps refine the result further. The
# same number for every row, whatever its range: a row's result must not depend on its neighbours'.
HALVINGS = math.ceil(math.log2(math.log(MAX_TEMPERATURE / MIN_TEMPERATURE) / 1e-3))
NEWTON_STEPS = 2


def transform(logits: Tensor, params: Sequence[Params | None]) -> TransformOutput:
    """Apply each row's method to `logits`, in place.

    Args:
        logits: [rows, vocab] float32, on any device. -inf (a forbidden token) stays -inf.
        params: one entry per row; None leaves its row untouched.

    Raises:
        ValueError: where shape, dtype or the number of parameters do not fit.

    Source: arXiv 2505.15134, section 4 and appendix A; `em_sampler.transforms.reference` is the reference.
    """
    check_batch(logits, params)
    eager = EagerTransform(logits.shape[1], logits.device, max_rows=logits.shape[0])
    return eager(logits, BatchParams.of(params, logits.device))


class EagerTransform:
    """`transform` with a workspace allocated once, for an engine that calls it at every step."""

    def __init__(self, vocab_size: int, device: torch.device, max_rows: int) -> None:
        self.chunk_rows = max(1, min(max_rows, CHUNK_ELEMENTS.get(device.type, 2**23) // max(vocab_size, 1)))
        self.buffers = torch.empty(BUFFERS, self.chunk_rows, vocab_size, dtype=torch.float32, device=device)
        # On the CPU, rows with nothing to do are left out. Elsewhere that would wait for the device: they are masked.
        self.compact = device.type == "cpu"

    @torch.no_grad()
    def __call__(self, logits: Tensor, params: BatchParams) -> TransformOutput:
        """Transform `logits` [rows, vocab] float32 in place, row i by row i of `params`."""
        method, threshold = params["method"].squeeze(1), params["threshold"].squeeze(1)
        before = self._entropies(logits, method != NO_METHOD)
        after = before.clone()
        steps = torch.zeros(len(before), dtype=torch.int32, device=logits.device)
        if params.max_steps:
            active = (method == EM_INF) & (before >= threshold)
            for rows in self._chunks(active):
                h, steps[rows] = self._descend(logits, rows, active[rows], params.take(rows))
                after[rows] = torch.where(active[rows], h, after[rows])
        if params.any_adaptive:
            active = (method == ADAPTIVE) & (before > threshold)
            for rows in self._chunks(active):
                h = self._cool(logits, rows, active[rows], params.take(rows), before[rows])
                after[rows] = torch.where(active[rows], h, after[rows])
            steps += active
        return TransformOutput.of(logits, before, after, steps)

    def _chunks(self, wanted: Tensor) -> tuple[Tensor, ...]:
        """Row numbers (int64) in chunks that fit the workspace: those wanted, or all where asking would wait."""
        rows = wanted.nonzero().squeeze(1) if self.compact else torch.arange(len(wanted), device=wanted.device)
        return torch.split(rows, self.chunk_rows) if len(rows) else ()

    def _entropies(self, logits: Tensor, wanted: Tensor) -> Tensor:  # [rows]
        entropies = torch.full((len(wanted),), math.nan, dtype=torch.float32, device=logits.device)
        for rows in self._chunks(wanted):
            z, c, p, pc = self.buffers[:4, : len(rows)]
            torch.index_select(logits, 0, rows, out=z)
            h = softmax_entropy(_below_peak(z, out=c), p, pc).squeeze(1)
            entropies[rows] = torch.where(wanted[rows], h, math.nan)
        return entropies

    def _descend(self, logits: Tensor, rows: Tensor, active: Tensor, params: BatchParams) -> tuple[Tensor, Tensor]:
        """EM-INF on `rows`; returns their entropies and steps, each [n].

        With c = z - E_p[z], log p + H is c, so the gradient needs no logarithm and is exactly 0 on a uniform row,
        where rounding noise divided by itself would make Adam step at random.
        """
        assert params.max_steps is not None
        z, c, p, g, p0, m, v = self.buffers[:, : len(rows)]
        torch.index_select(logits, 0, rows, out=z)
        adam, rate = params["adam"], params["learning_rate"]
        beta1 = BETA1 * adam  # sgd is Adam without momentum whose denominator is 1
        floor = adam * EPSILON + (1 - adam)
        m.zero_()
        v.zero_()
        active = active.unsqueeze(1)
        taken = torch.zeros_like(active, dtype=torch.int32)
        for step in range(1, params.max_steps + 2):
            h = softmax_entropy(_below_peak(z, out=c), p, g)
            active = active & (h >= params["threshold"]) & (step <= params["steps"])
            if step > params.max_steps or (self.compact and not active.any()):
                break
            taken += active
            if step == 1:
                p0.copy_(p)
            c.sub_(g.sum(1, keepdim=True))
            torch.sub(p, p0, out=g).mul_(params["kl_weight"]).sub_(c.mul_(p))
            m.mul_(beta1).addcmul_(g, 1 - beta1)
            v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            torch.sqrt(v, out=c).mul_(adam / math.sqrt(1 - BETA2**step)).add_(floor)
            scale = torch.where(active, rate / (1 - beta1**step), 0.0)
            z.sub_(torch.div(m, c, out=c).mul_(scale))
        _write_back(logits, rows, z, taken > 0, spare=c)
        return h.squeeze(1), taken.squeeze(1)

    def _cool(self, logits: Tensor, rows: Tensor, active: Tensor, params: BatchParams, before: Tensor) -> Tensor:
        """Adaptive temperature on `rows`; returns their entropies, [n].

        H(softmax(z / T)) rises with T. Bisection on log T is sure to end inside the tolerance; Newton's steps, with
        dH / d log T = Var_p[z / T], take the result to float32's accuracy where the curve is smooth.
        """
        z, base, c, p, pc = self.buffers[:5, : len(rows)]
        torch.index_select(logits, 0, rows, out=z)
        _below_peak(z, out=base)
        target = torch.maximum(params["ratio"] * before.unsqueeze(1), params["threshold"])
        low, high = params["min_t"].log(), params["max_t"].log()

        def entropy_at(log_t: Tensor) -> Tensor:  # [n, 1]
            return softmax_entropy(torch.mul(base, (-log_t).exp(), out=c), p, pc)

        hottest = entropy_at(high) <= target
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            cold = entropy_at(middle) <= target
            low, high = torch.where(cold, middle, low), torch.where(cold, high, middle)
        log_t = low
        for _ in range(NEWTON_STEPS):
            excess = entropy_at(log_t) - target
            mean = pc.sum(1, keepdim=True)
            variance = pc.mul_(c).sum(1, keepdim=True) - mean**2
            log_t = torch.minimum(torch.maximum(log_t - excess / variance.clamp_min(1e-30), low), high)
        log_t = torch.where(hottest, params["max_t"].log(), log_t)
        h = entropy_at(log_t)
        _write_back(logits, rows, z.div_(log_t.exp()), active.unsqueeze(1), spare=c)
        return h.squeeze(1)


def _below_peak(z: Tensor, out: Tensor) -> Tensor:
    """z minus its row's maximum, at least FLOOR. NaN throughout where a row holds NaN; NaN somewhere for +inf."""
    return torch.sub(z, z.amax(1, keepdim=True), out=out).clamp_(min=FLOOR)


def softmax_entropy(c: Tensor, p: Tensor, pc: Tensor) -> Tensor:
    """Entropy [rows, 1] in nats of softmax(c), with c at most 0 [rows, vocab]; fills p = softmax(c) and pc = p * c."""
    total = torch.exp(c, out=p).sum(1, keepdim=True)
    p.div_(total)
    return total.log() - torch.mul(p, c, out=pc).sum(1, keepdim=True)


def _write_back(logits: Tensor, rows: Tensor, z: Tensor, changed: Tensor, spare: Tensor) -> None:
    """Rows of z into logits where `changed` ([n, 1]); the others keep every bit."""
    torch.index_select(logits, 0, rows, out=spare)
    logits.index_copy_(0, rows, torch.where(changed, z, spare, out=spare))
