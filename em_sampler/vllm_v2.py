"""The V2 runner's side: request slots in, the parameters of each row out.

Contract: vllm/v1/worker/gpu/sample/logits_processor/interface.py, vLLM 0.31 to 0.33. A row is not a request.
"""

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

from em_sampler.params import Params
from em_sampler.plugin import requested
from em_sampler.torch_batched import BatchedTransform, RowParams, host_bounds


class V2Processor(LogitsProcessor):
    """Applies each request's method to its rows: one, or one per draft token under speculative decoding.

    Slots are recycled without notice, so `add_request` overwrites everything that is known of a slot.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        slots, device = req_states.max_num_reqs, req_states.device
        drafts = vllm_config.num_speculative_tokens
        self.params: list[Params | None] = [None] * slots
        self.has_method = np.zeros(slots, dtype=bool)
        self.table = RowParams.of(self.params, device)  # a row per slot
        self.stale = False  # the table on the device is behind `params`
        self.transform = BatchedTransform(req_states.vocab_size, device, slots * (1 + drafts))

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take over slot `req_idx`; whether its request has anything for us to do."""
        self.params[req_idx] = requested(sampling_params)
        self.has_method[req_idx] = self.params[req_idx] is not None
        self.stale = True
        return bool(self.has_method[req_idx])

    def apply_staged_writes(self) -> None:
        """Bring new slots to the device, before the step that samples for them."""
        if self.stale:
            self.table = RowParams.of(self.params, self.table.values.device)
            self.stale = False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Transform `logits` [rows, vocab] float32 in place. Nothing here waits for the device."""
        live = ctx.idx_mapping_np[self.has_method[ctx.idx_mapping_np]]
        if len(live):
            values = self.table.values.index_select(0, ctx.expanded_idx_mapping)
            bounds = host_bounds([self.params[slot] for slot in live])
            self.transform(logits, RowParams(values, *bounds))
        return logits
