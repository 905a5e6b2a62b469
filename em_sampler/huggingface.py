"""The transform for `transformers`: `model.generate(..., logits_processor=[EntropyMinimizer(params)])`.

`generate` runs it after its own penalties and before temperature, top-k and top-p. It returns log-probabilities, which
beam search adds up; sampling does not depend on a row's normalisation.
"""

import torch
from transformers import LogitsProcessor

from em_sampler.params import Params
from em_sampler.transforms.batch import TransformOutput
from em_sampler.transforms.dispatch import transform


class EntropyMinimizer(LogitsProcessor):
    """Applies the same params to every row of a batch. Greedy decoding keeps its tokens.

    Attributes:
        params: the method and its settings.
        temperature: that of `generate`, for methods that remove tokens.
        last: the entropies [rows] in nats and the steps [rows] of the latest token, None before the first.
    """

    supports_continuous_batching = True  # a row's result depends on nothing but the row

    def __init__(self, params: Params, temperature: float = 1.0) -> None:
        self.params, self.temperature = params, temperature
        self.last: TransformOutput | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return new log-probabilities for `scores` [rows, vocab], in their dtype. `scores` itself does not change."""
        logits = scores.to(torch.float32, copy=True)
        self.last = transform(logits, [self.params] * len(logits), [self.temperature] * len(logits))
        return logits.log_softmax(-1).to(scores.dtype)  # type: ignore[return-value]
