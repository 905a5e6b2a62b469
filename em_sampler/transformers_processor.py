"""The transform for `transformers`: `model.generate(..., logits_processor=[EntropyMinimizer(params)])`.

`generate` runs it after its own penalties and before temperature, top-k and top-p.
"""

import torch
from transformers import LogitsProcessor

from em_sampler.backends import fastest_transform
from em_sampler.params import Params
from em_sampler.rows import BatchTransform, RowParams, Transformed


class EntropyMinimizer(LogitsProcessor):
    """Applies one set of parameters to every row of a batch; greedy decoding gives the tokens it gave before.

    Attributes:
        last: the entropies [rows] in nats and the steps [rows] of the latest token, None before the first.
    """

    supports_continuous_batching = True  # a row's result depends on nothing but the row

    def __init__(self, params: Params) -> None:
        self.params = params
        self.last: Transformed | None = None
        self.transform: BatchTransform | None = None
        self.shape = (0, 0)  # what it was made for

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """New scores for `scores` [rows, vocab], in the same dtype; `scores` itself is left as it is."""
        logits = scores.to(torch.float32, copy=True)
        rows, vocab = logits.shape
        if self.transform is None or rows > self.shape[0] or vocab != self.shape[1]:
            self.transform, self.shape = fastest_transform(vocab, logits.device, rows), (rows, vocab)
        self.last = self.transform(logits, RowParams.of([self.params] * rows, logits.device))
        return logits.to(scores.dtype)  # type: ignore[return-value]
