"""The likeliest tokens of a row after its method, with their probabilities before it: for requests that set `top`.

Computed for the rows of those requests alone, between the transform and the sampler.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from em_sampler.params import MAX_TOP


class Watch:
    """Some rows as they were before the transform."""

    def __init__(self, logits: Tensor, rows: NDArray[np.int64]) -> None:
        """Copy `rows` of `logits` [all rows, vocab] without waiting for the device."""
        index = torch.from_numpy(rows)
        self.rows = rows
        self.index = index.pin_memory().to(logits.device, non_blocking=True) if logits.is_cuda else index
        self.before = logits.index_select(0, self.index)

    @classmethod
    def of(cls, logits: Tensor, rows: NDArray[np.int64]) -> "Watch | None":
        """Return a watch of these rows, None for none."""
        return cls(logits, rows) if len(rows) else None

    def candidates(self, logits: Tensor) -> Tensor:
        """Return the candidates of the rows, now that `logits` are transformed: int32 [3, rows, k], k up to MAX_TOP.

        These are token ids and the bits of two float32, the probabilities before and after at temperature 1. The
        likeliest after the method come first, then the likeliest that it removed. Both probabilities are NaN if the
        token was forbidden before, and in a row that could not be measured.
        """
        after = logits.index_select(0, self.index)
        # Below all tokens that stayed, those that were removed keep their order; what was -inf before stays last.
        removed = after.isneginf()
        lowest = after.masked_fill(removed, torch.inf).amin(dim=1, keepdim=True)
        highest = self.before.amax(dim=1, keepdim=True)
        order = torch.where(removed, self.before - highest + lowest - 1, after)
        ids = order.topk(min(MAX_TOP, order.shape[1]), dim=1).indices
        absent = self.before.gather(1, ids).isneginf() | ~_log_sum(self.before).isfinite()
        found = ((z.gather(1, ids) - _log_sum(z)).exp().masked_fill(absent, torch.nan) for z in (self.before, after))
        return torch.stack((ids.int(), *(p.view(torch.int32) for p in found)))


def _log_sum(logits: Tensor) -> Tensor:
    return logits.logsumexp(dim=1, keepdim=True)
