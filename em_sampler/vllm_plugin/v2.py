"""The V2 runner's side: request slots in, the parameters of each row out.

Contract: vllm/v1/worker/gpu/sample/logits_processor/interface.py, vLLM 0.31 to 0.33. A row is not a request.
"""

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

from em_sampler.params import Params
from em_sampler.stats.aggregator import ReturnAddress
from em_sampler.stats.recorder import StatsRecorder
from em_sampler.transforms.batch import BatchParams, host_limits
from em_sampler.transforms.dispatch import build_transform
from em_sampler.vllm_plugin.request import params_of


class V2Processor(LogitsProcessor):
    """Applies each request's method to its rows: one, or one per draft token under speculative decoding.

    Slots are recycled without notice, so `add_request` overwrites everything that is known of a slot.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        slots, device = req_states.max_num_reqs, req_states.device
        rows, parallel = slots * (1 + vllm_config.num_speculative_tokens), vllm_config.parallel_config
        self.req_states = req_states
        self.params: list[Params | None] = [None] * slots
        self.has_method = np.zeros(slots, dtype=bool)
        self.table = BatchParams.of(self.params, device)  # a row per slot
        self.stale = False  # the table on the device is behind `params`
        self.transform = build_transform(req_states.vocab_size, device, rows)
        self.telemetry = StatsRecorder(slots, rows, device, reports=parallel.rank % parallel.tensor_parallel_size == 0)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take over slot `req_idx`; whether its request has anything for us to do."""
        params = self.params[req_idx] = params_of(sampling_params)
        self.telemetry.bind(req_idx, ReturnAddress.of(sampling_params.extra_args) if params else None)
        self.has_method[req_idx] = params is not None
        self.stale = True
        return bool(self.has_method[req_idx])

    def apply_staged_writes(self) -> None:
        """Bring new slots to the device, before the step that samples for them."""
        if self.stale:
            self.table = BatchParams.of(self.params, self.table.values.device)
            self.stale = False

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Transform `logits` [rows, vocab] float32 in place. Nothing here waits for the device."""
        live = ctx.idx_mapping_np[self.has_method[ctx.idx_mapping_np]]
        if not len(live):
            return logits
        values = self.table.values.index_select(0, ctx.expanded_idx_mapping)
        bounds = host_limits([self.params[slot] for slot in live])
        stage = self.telemetry.begin()
        done = self.transform(logits, BatchParams(values, *bounds))
        if stage:
            self.telemetry.end(stage, ctx.expanded_idx_mapping.int(), self._output_positions(ctx), done)
        return logits

    def _output_positions(self, ctx: LogitsContext) -> Tensor:  # int32 [rows]
        """The place in its reply of the token that each row samples; -1 where a request is still in prefill."""
        slots, seen = ctx.expanded_idx_mapping, ctx.pos + 1
        prompt = self.req_states.prompt_len.gpu.index_select(0, slots)
        prefill = self.req_states.prefill_len.gpu.index_select(0, slots)
        return torch.where(seen < prefill, -1, seen - prompt).int()
