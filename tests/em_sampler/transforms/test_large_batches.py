"""The Triton transform on a device with batches as large as an engine's: many programs at once, on shared memory."""

import pytest
import torch

from em_sampler import AdaptiveTemperatureParams, EMInfParams
from em_sampler.params import Params
from em_sampler.transforms.batch import BatchParams
from em_sampler.transforms.eager import EagerTransform
from em_sampler.transforms.triton_cuda import TritonTransform
from tests.em_sampler.transforms.support import DEVICE, FLOAT32_DRIFT

# An emulated device ("cpu:0") takes seconds for a row.
ROWS, VOCAB = (4, 9001) if DEVICE.startswith("cpu:") else (256, 151_936)
METHODS: tuple[Params | None, ...] = (
    EMInfParams(threshold=0.0),
    AdaptiveTemperatureParams(threshold=0.0),
    EMInfParams(threshold=0.0, optimizer="sgd"),
    None,
)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU (benchmarks/gpu.sh)")
def test_a_large_batch_has_the_same_bits_again_and_those_of_the_eager_transform_within_rounding() -> None:
    device = torch.device(DEVICE)
    generator = torch.Generator(device).manual_seed(1)
    scale = torch.rand(ROWS, 1, generator=generator, device=device) * 6 + 0.1
    before = (torch.randn(ROWS, VOCAB, generator=generator, device=device) * scale).bfloat16().float()
    params = BatchParams.of([METHODS[row % len(METHODS)] for row in range(ROWS)], device)

    transform = TritonTransform(VOCAB, device, max_rows=ROWS)
    first = [values.clone() for values in transform(before.clone(), params)]
    for again, values in zip(transform(before.clone(), params), first, strict=True):
        assert torch.equal(again.view(torch.int32), values.view(torch.int32))

    wanted = EagerTransform(VOCAB, device, max_rows=ROWS)(before.clone(), params)
    logits, stats = first
    distance = (logits.double().softmax(-1) - wanted.logits.double().softmax(-1)).abs().sum(-1) / 2
    assert distance.max() < FLOAT32_DRIFT
    assert torch.equal(logits[3::4], before[3::4])
    assert torch.equal(stats[3], wanted.stats[3])  # the steps
