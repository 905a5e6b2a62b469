"""The V1 runner's side: batch updates in, the parameters of each row out.

Contract: vllm/v1/sample/logits_processor/interface.py, vLLM 0.31 to 0.33. A row is a request; rows move.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality

from em_sampler.params import Params
from em_sampler.plugin import requested
from em_sampler.torch_batched import BatchedTransform, RowParams


class V1Processor(LogitsProcessor):
    """Applies each request's method to its row. Runs after the grammar mask, bad words, min-tokens and logit bias."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self.params: dict[int, Params] = {}  # row -> parameters, for rows that have any
        self.packed: RowParams | None = None  # the same for the device; None when the batch has changed since
        self.transform = BatchedTransform(
            vllm_config.model_config.get_vocab_size(), device, vllm_config.scheduler_config.max_num_seqs
        )

    def is_argmax_invariant(self) -> bool:
        """False, although it is: vLLM would run an invariant processor after the temperature."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that left, came and moved, in the order the interface asks for."""
        if batch_update is None:
            return
        self.packed = None  # also when only plain requests moved: the number of rows may differ
        for row in batch_update.removed:
            self.params.pop(row, None)
        for row, sampling_params, *_ in batch_update.added:
            self._place(row, requested(sampling_params))
        for source, target, direction in batch_update.moved:
            moved, displaced = self.params.pop(source, None), self.params.pop(target, None)
            self._place(target, moved)
            if direction == MoveDirectionality.SWAP:
                self._place(source, displaced)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Transform `logits` [requests, vocab] float32 in place."""
        if not self.params:
            return logits
        if self.packed is None or len(self.packed.values) != len(logits):
            self.packed = RowParams.of([self.params.get(row) for row in range(len(logits))], self.device)
        self.transform(logits, self.packed)
        return logits

    def _place(self, row: int, params: Any) -> None:
        if params is None:
            self.params.pop(row, None)
        else:
            self.params[row] = params
