"""The V2 runner's processor: request slots in, the params of each row out.

Contract: vllm/v1/worker/gpu/sample/logits_processor/interface.py, vLLM 0.31 to 0.33. A row is not a request.
"""

import numpy as np
import torch
from numpy.typing import NDArray
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
from em_sampler.stats.candidates import Watch
from em_sampler.stats.recorder import StatsRecorder
from em_sampler.transforms.batch import BatchParams, Column, host_limits, pack_row, to_device
from em_sampler.transforms.eager import EagerTransform
from em_sampler.vllm_plugin.request import params_in_worker
from em_sampler.vllm_plugin.transform import build_transform


class V2Processor(LogitsProcessor):
    """Applies each request's method to its rows: one, or one per draft token under speculative decoding.

    vLLM recycles slots without notice, so `add_request` overwrites everything that is known of a slot.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        slots, device = req_states.max_num_reqs, req_states.device
        rows, parallel = slots * (1 + vllm_config.num_speculative_tokens), vllm_config.parallel_config
        is_first_rank = parallel.rank % parallel.tensor_parallel_size == 0
        is_sharded = bool(parallel.enable_batch_sharded_sampling)  # each rank samples requests of its own
        self.req_states = req_states
        self.params: list[Params | None] = [None] * slots
        self.has_method = np.zeros(slots, dtype=bool)
        self.top = np.zeros(slots, dtype=np.int64)  # candidates that each slot's request wants
        self.device = device
        self.table = np.zeros((slots, len(Column)), dtype=np.float32)  # `pack_row` of each slot's params
        self.device_table = to_device(self.table, device)
        self.is_stale = False  # `device_table` is behind `table`
        self.transform = build_transform(parallel, req_states.vocab_size, device, rows)
        self.needs_limits = isinstance(self.transform, EagerTransform)
        self.recorder = StatsRecorder(slots, rows, device, enabled=is_first_rank or is_sharded)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Assign slot `req_idx` to a request; return whether it has a method."""
        params = self.params[req_idx] = params_in_worker(sampling_params)
        self.recorder.assign(req_idx, ReturnAddress.from_extra_args(sampling_params.extra_args) if params else None)
        self.has_method[req_idx] = params is not None
        self.top[req_idx] = params.top if params else 0
        self.table[req_idx] = pack_row(params, sampling_params.temperature)
        self.is_stale = True
        return bool(self.has_method[req_idx])

    def apply_staged_writes(self) -> None:
        """Copy the params of new requests to the device, before the step that samples for them."""
        if self.is_stale:
            self.device_table = to_device(self.table, self.device)
            self.is_stale = False

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Transform `logits` [rows, vocab] float32 in place. Nothing here waits for the device."""
        active = ctx.idx_mapping_np[self.has_method[ctx.idx_mapping_np]]  # slots, [requests with a method]
        if not len(active):
            return logits
        values = self.device_table.index_select(0, ctx.expanded_idx_mapping)
        # Only the eager form asks for the limits, which take longer to find than the fast forms take to start.
        limits = host_limits([self.params[slot] for slot in active]) if self.needs_limits else (0, frozenset())
        batch_params = BatchParams(values, *limits)
        buffer = self.recorder.start_step()
        if buffer:
            buffer.watch = Watch.of(logits, self._watched(ctx))
        output = self.transform(logits, batch_params)
        if buffer:
            self.recorder.finish_step(buffer, ctx.expanded_idx_mapping.int(), self._positions(ctx), output)
        return logits

    def _watched(self, ctx: LogitsContext) -> NDArray[np.int64]:
        """Return the rows whose candidates are wanted; all of them if some are and only the device knows which."""
        watched = np.flatnonzero(self.top[ctx.idx_mapping_np])
        rows = len(ctx.expanded_idx_mapping)
        return watched if rows == len(ctx.idx_mapping_np) or not len(watched) else np.arange(rows)

    def _positions(self, ctx: LogitsContext) -> Tensor:
        """Return each row's token's position in its choice, int32 [rows]; -1 for a request still in prefill."""
        slots, seen = ctx.expanded_idx_mapping, ctx.pos + 1
        prompt = self.req_states.prompt_len.gpu.index_select(0, slots)
        prefill = self.req_states.prefill_len.gpu.index_select(0, slots)
        return torch.where(seen < prefill, -1, seen - prompt).int()
