"""The V1 runner's side: batch updates in, the parameters of each row out.

Contract: vllm/v1/sample/logits_processor/interface.py, vLLM 0.31 to 0.33. A row is a request; rows move.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality

from em_sampler.params import Params
from em_sampler.stats.aggregator import ReturnAddress
from em_sampler.stats.recorder import StatsRecorder
from em_sampler.transforms.batch import BatchParams
from em_sampler.transforms.dispatch import build_transform
from em_sampler.vllm_plugin.request import params_of


class Place(NamedTuple):
    """A request that has something for us to do."""

    params: Params
    slot: int  # stays the same when its row moves
    output: list[int]  # its tokens so far: vLLM's own list, which grows


class V1Processor(LogitsProcessor):
    """Applies each request's method to its row. Runs after the grammar mask, bad words, min-tokens and logit bias."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        rows, parallel = vllm_config.scheduler_config.max_num_seqs, vllm_config.parallel_config
        self.device = device
        self.places: dict[int, Place] = {}  # by row
        self.free_slots = list(range(rows))
        self.packed: BatchParams | None = None  # the same for the device; None when the batch has changed since
        self.slots: Tensor  # int32 [rows], beside it
        self.outputs: list[list[int]]  # [rows]
        self.transform = build_transform(vllm_config.model_config.get_vocab_size(), device, rows)
        self.telemetry = StatsRecorder(rows, rows, device, reports=parallel.rank % parallel.tensor_parallel_size == 0)

    def is_argmax_invariant(self) -> bool:
        """False, although it is: vLLM would run an invariant processor after the temperature."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that left, came and moved, in the order the interface asks for."""
        if batch_update is None:
            return
        self.packed = None  # also when only plain requests moved: the number of rows may differ
        for row in batch_update.removed:
            self._leave(row)
        for row, sampling_params, _, output in batch_update.added:
            self._leave(row)
            self._enter(row, sampling_params, output)
        for source, target, direction in batch_update.moved:
            moved, displaced = self.places.pop(source, None), self.places.pop(target, None)
            if moved:
                self.places[target] = moved
            if displaced and direction == MoveDirectionality.SWAP:
                self.places[source] = displaced
            elif displaced:
                self._release(displaced)

    def apply(self, logits: Tensor) -> Tensor:
        """Transform `logits` [requests, vocab] float32 in place."""
        if not self.places:
            return logits
        if self.packed is None or len(self.packed.values) != len(logits):
            places = [self.places.get(row) for row in range(len(logits))]
            self.packed = BatchParams.of([place and place.params for place in places], self.device)
            self.slots = self._on_device([place.slot if place else -1 for place in places])
            self.outputs = [place.output if place else [] for place in places]
        stage = self.telemetry.begin()
        done = self.transform(logits, self.packed)
        if stage:
            # A request still in prefill samples its next token again and again: the last time counts.
            self.telemetry.end(stage, self.slots, self._on_device([*map(len, self.outputs)]), done)
        return logits

    def _enter(self, row: int, sampling_params: SamplingParams, output: list[int]) -> None:
        params = params_of(sampling_params)
        if params:
            place = self.places[row] = Place(params, self.free_slots.pop(), output)
            self.telemetry.bind(place.slot, ReturnAddress.of(sampling_params.extra_args))

    def _leave(self, row: int) -> None:
        if row in self.places:
            self._release(self.places.pop(row))

    def _release(self, place: Place) -> None:
        self.telemetry.bind(place.slot, None)
        self.free_slots.append(place.slot)

    def _on_device(self, values: list[int]) -> Tensor:
        tensor = torch.from_numpy(np.array(values, dtype=np.int32))  # sooner made than torch.tensor(values)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)
