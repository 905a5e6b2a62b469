"""The V1 runner's processor: batch updates in, the params of each row out.

Contract: vllm/v1/sample/logits_processor/interface.py, vLLM 0.31 to 0.33. A row is a request; rows move.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality

from em_sampler.params import Params
from em_sampler.stats.aggregator import ReturnAddress
from em_sampler.stats.candidates import Watch
from em_sampler.stats.recorder import StatsRecorder
from em_sampler.transforms.batch import BatchParams
from em_sampler.vllm_plugin.request import params_in_worker
from em_sampler.vllm_plugin.transform import build_transform


class ActiveRequest(NamedTuple):
    """A request with a method."""

    params: Params
    temperature: float
    slot: int  # ours, for the recorder; stays the same when the row moves
    output_token_ids: list[int]  # vLLM's own list, which grows


class V1Processor(LogitsProcessor):
    """Applies each request's method to its row. Runs after the grammar mask, bad words, min-tokens and logit bias."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        rows, parallel = vllm_config.scheduler_config.max_num_seqs, vllm_config.parallel_config
        is_first_rank = parallel.rank % parallel.tensor_parallel_size == 0
        self.device = device
        self.active: dict[int, ActiveRequest] = {}  # by row
        self.free_slots = list(range(rows))
        # What a step needs of the active requests, row by row. None if the batch has changed since it was made.
        self.batch_params: BatchParams | None = None
        self.slots: Tensor  # int32 [rows], -1 for a row without a method
        self.output_token_ids: list[list[int]]  # [rows]
        self.watched: NDArray[np.int64]  # the rows whose candidates are wanted
        self.transform = build_transform(parallel, vllm_config.model_config.get_vocab_size(), device, rows)
        self.recorder = StatsRecorder(rows, rows, device, enabled=is_first_rank)

    def is_argmax_invariant(self) -> bool:
        """Return False: EM-INF keeps the argmax, but if True, vLLM would run it after the temperature."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that were removed, added and moved, in the order that vLLM's interface asks for."""
        if batch_update is None:
            return
        self.batch_params = None  # also if only requests without a method moved: the number of rows may differ
        for row in batch_update.removed:
            self._remove(row)
        for row, sampling_params, _, output_token_ids in batch_update.added:
            self._remove(row)
            self._add(row, sampling_params, output_token_ids)
        for source, target, direction in batch_update.moved:
            moved, displaced = self.active.pop(source, None), self.active.pop(target, None)
            if moved:
                self.active[target] = moved
            if displaced and direction == MoveDirectionality.SWAP:
                self.active[source] = displaced
            elif displaced:
                self._free_slot(displaced.slot)

    def apply(self, logits: Tensor) -> Tensor:
        """Transform `logits` [rows, vocab] float32 in place."""
        if not self.active:
            return logits
        if self.batch_params is None or len(self.batch_params.values) != len(logits):
            requests = [self.active.get(row) for row in range(len(logits))]
            self.batch_params = BatchParams.of(
                [request and request.params for request in requests],
                self.device,
                [request.temperature if request else 1.0 for request in requests],
            )
            self.slots = self._on_device([request.slot if request else -1 for request in requests])
            self.output_token_ids = [request.output_token_ids if request else [] for request in requests]
            self.watched = np.flatnonzero([request.params.top if request else 0 for request in requests])
        buffer = self.recorder.start_step()
        if buffer:
            buffer.watch = Watch.of(logits, self.watched)
        output = self.transform(logits, self.batch_params)
        if buffer:
            # A request still in prefill samples its next token again and again: the last time counts.
            positions = self._on_device([*map(len, self.output_token_ids)])
            self.recorder.finish_step(buffer, self.slots, positions, output)
        return logits

    def _add(self, row: int, sampling_params: SamplingParams, output_token_ids: list[int]) -> None:
        params = params_in_worker(sampling_params)
        if params:
            slot = self.free_slots.pop()
            self.active[row] = ActiveRequest(params, sampling_params.temperature, slot, output_token_ids)
            self.recorder.assign(slot, ReturnAddress.from_extra_args(sampling_params.extra_args))

    def _remove(self, row: int) -> None:
        if row in self.active:
            self._free_slot(self.active.pop(row).slot)

    def _free_slot(self, slot: int) -> None:
        self.recorder.assign(slot, None)
        self.free_slots.append(slot)

    def _on_device(self, values: list[int]) -> Tensor:
        """Make an int32 tensor without waiting for the device."""
        tensor = torch.from_numpy(np.array(values, dtype=np.int32))  # faster than torch.tensor(values)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)
