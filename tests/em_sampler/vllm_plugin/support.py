"""What the tests of both runners share: requests, batches, and a recorder that remembers the last step.

Update and context classes are vLLM's; its config is replaced by one that has only the sizes that are read.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState

from em_sampler import EMInfParams
from em_sampler.params import Params
from em_sampler.stats.aggregator import ReturnAddress
from em_sampler.stats.candidates import Watch
from em_sampler.transforms.batch import BatchParams, TransformOutput
from em_sampler.transforms.numba_cpu import NumbaTransform
from em_sampler.vllm_plugin.processor import EMInfLogitsProcessor
from em_sampler.vllm_plugin.v1 import V1Processor
from em_sampler.vllm_plugin.v2 import V2Processor

VOCAB, ROWS, CPU = 50, 8, torch.device("cpu")
SOCKET_NAME = "0" * 32 + ".0"


def parallel_config(rank: int = 0, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1) -> Any:
    sizes = {"tensor_parallel_size": tensor_parallel_size, "pipeline_parallel_size": pipeline_parallel_size}
    world_size = tensor_parallel_size * pipeline_parallel_size
    return SimpleNamespace(rank=rank, world_size=world_size, enable_batch_sharded_sampling=None, **sizes)


def config(rank: int = 0, tensor_parallel_size: int = 1) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB),
        scheduler_config=SimpleNamespace(max_num_seqs=ROWS),
        parallel_config=parallel_config(rank, tensor_parallel_size),
        num_speculative_tokens=3,
    )


def states() -> Any:
    lengths = [SimpleNamespace(gpu=torch.zeros(ROWS, dtype=torch.int32)) for _ in range(2)]
    unused: Any = None
    return LogitsProcRequestState(CPU, ROWS, VOCAB, unused, *lengths, unused)  # type: ignore[arg-type]


def v1(rank: int = 0, tensor_parallel_size: int = 1) -> V1Processor:
    processor = EMInfLogitsProcessor(config(rank, tensor_parallel_size), CPU, False)
    assert isinstance(processor, V1Processor)
    return processor


def v2(rank: int = 0, tensor_parallel_size: int = 1) -> V2Processor:
    processor = EMInfLogitsProcessor(config(rank, tensor_parallel_size), states())
    assert isinstance(processor, V2Processor)
    return processor


def asking(steps: int, temperature: float = 1.0, number: int | None = None, top: int = 0) -> SamplingParams:
    """A request for EM-INF with this many steps (0: without a method), and with the request number if it has one."""
    wanted = {"stats": "tokens", "top": top} if top else {}
    extra_args: dict[str, Any] = {"em_inf": {"steps": steps, "threshold": 0.0} | wanted} if steps else {}
    if number is not None:
        extra_args |= ReturnAddress(SOCKET_NAME, number, 0, True).to_extra_args()
    return SamplingParams(temperature=temperature, extra_args=extra_args or None)


def update(removed: list[int], added: list[tuple[int, SamplingParams]], moved: list[Any], size: int) -> BatchUpdate:
    """What the V1 runner reports of a batch."""
    return BatchUpdate(size, removed, [(row, params, None, []) for row, params in added], moved)


def context(
    slots_of_requests: list[int], slots_of_rows: list[int], positions: list[int] | None = None
) -> LogitsContext:
    """What the V2 runner reports of a step."""
    rows, requests = torch.tensor(slots_of_rows, dtype=torch.int32), np.array(slots_of_requests)
    pos = torch.tensor(positions or [0] * len(slots_of_rows))
    unused: Any = None
    return LogitsContext(rows, unused, requests, unused, unused, pos, unused)


def logits_of(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows))


def expected(rows: int, steps: list[int]) -> torch.Tensor:
    """`logits_of(rows)` transformed, row i with `steps[i]` steps (0: without a method)."""
    params: list[Params | None] = [EMInfParams(steps=n, threshold=0.0) if n else None for n in steps]
    return NumbaTransform(VOCAB)(logits_of(rows), BatchParams.of(params)).logits


class FakeRecorder:
    """In the place of `StatsRecorder`: remembers the last step, by request."""

    def __init__(self) -> None:
        self.assigned: dict[int, int] = {}  # slot -> request number
        self.last: list[tuple[int | None, int]] | None = None  # (request number, position) of each row
        self.output: TransformOutput | None = None
        self.watch: Watch | None = None

    def assign(self, slot: int, return_address: ReturnAddress | None) -> None:
        self.assigned.pop(slot, None)
        if return_address:
            assert return_address.request_number not in self.assigned.values()
            self.assigned[slot] = return_address.request_number

    def start_step(self) -> "FakeRecorder | None":
        self.last, self.watch = None, None
        return self if self.assigned else None

    def finish_step(
        self, buffer: "FakeRecorder", slots: torch.Tensor, positions: torch.Tensor, output: TransformOutput
    ) -> None:
        assert buffer is self
        assert slots.dtype == positions.dtype == torch.int32
        rows = zip(slots.tolist(), positions.tolist(), strict=True)
        self.last = [(self.assigned.get(slot), position) for slot, position in rows]
        self.output = output


def record(processor: V1Processor | V2Processor) -> FakeRecorder:
    """Give the processor a FakeRecorder."""
    processor.recorder = recorder = FakeRecorder()  # type: ignore[assignment]
    return recorder
