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
        k = min(MAX_TOP, after.shape[1])
        # The likeliest tokens that stayed are in the first half, the likeliest that were removed in the other.
        ids = torch.cat((after.topk(k).indices, self.before.topk(k).indices), dim=1)
        was, now = self.before.gather(1, ids), after.gather(1, ids)
        removed = now.isneginf()
        in_other_half = torch.arange(2 * k, device=ids.device) >= k
        lowest = now.masked_fill(removed, torch.inf).amin(dim=1, keepdim=True)
        order = torch.where(removed, was - was.amax(dim=1, keepdim=True) + lowest - 1, now)
        order, best = order.masked_fill(removed != in_other_half, -torch.inf).topk(k)
        was, now = was - self.before.logsumexp(dim=1, keepdim=True), now - after.logsumexp(dim=1, keepdim=True)
        present = order.isfinite() & was.gather(1, best).isfinite()
        found = (log_p.exp().gather(1, best).masked_fill(~present, torch.nan) for log_p in (was, now))
        return torch.stack((ids.gather(1, best).int(), *(p.view(torch.int32) for p in found)))
