"""The released method, for comparison: one row at a time, by autograd and a fresh torch.optim.Adam for every row.

Written from its description (arXiv 2505.15134, section 4 and appendix A), without any of its code; EM-INF only.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from em_sampler.params import EMInfParams

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}

# Replaces -inf: its probability is 0 too, and the sums and their gradients have no 0 * -inf, which is NaN.
MASKED_LOGIT = -1e6


def released_method(logits: Tensor, params: EMInfParams) -> Tensor:
    """Return the rows of `logits` [rows, vocab] float32 after EM-INF, as a new tensor."""
    return torch.stack([_minimize_row(row, params) for row in logits])


@torch.enable_grad()  # `generate` runs its processors without
def _minimize_row(row: Tensor, params: EMInfParams) -> Tensor:  # [vocab]
    z = row.detach().clamp(min=MASKED_LOGIT).requires_grad_()
    optimizer = OPTIMIZERS[params.optimizer]([z], lr=params.learning_rate)  # type: ignore[call-arg]
    log_p0 = torch.log_softmax(z.detach(), -1)
    p0 = log_p0.exp()
    for _ in range(params.steps):
        log_p = torch.log_softmax(z, -1)
        entropy = -(log_p.exp() * log_p).sum()
        if entropy.item() < params.threshold:
            break
        loss = entropy + params.kl_weight * (p0 * (log_p0 - log_p)).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return torch.where(row == -torch.inf, row, z.detach())


class ReleasedProcessor(LogitsProcessor):
    """The released method for `model.generate(..., logits_processor=[ReleasedProcessor(params)])`."""

    def __init__(self, params: EMInfParams) -> None:
        self.params = params

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return new scores for `scores` [rows, vocab], in the same dtype; `scores` itself does not change."""
        return released_method(scores.float(), self.params).to(scores.dtype)  # type: ignore[return-value]
