"""What the tests of the transforms share: the implementations by name, and the reference's answer for a row."""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from em_sampler import AdaptiveTemperatureParams, EMInfParams
from em_sampler.params import Params
from em_sampler.transforms import eager, reference
from em_sampler.transforms.batch import BatchParams, TransformOutput
from em_sampler.transforms.eager import EagerTransform
from em_sampler.transforms.triton_cuda import TritonTransform

if TYPE_CHECKING:
    from em_sampler.transforms.numba_cpu import NumbaTransform

Row = npt.NDArray[np.float64]
Rows = Sequence[Params | None]
Temperatures = Sequence[float] | None
DEVICE = os.environ.get("EM_TEST_DEVICE", "cpu")  # benchmarks/gpu.sh asks for "cuda"
# Total variation between float32 and the reference's float64 after at most the steps taken here; the largest found was
# 2.4e-5.
FLOAT32_DRIFT = 1e-4


def rows_of(seed: int, count: int, vocab: int, masked: float = 0.2) -> torch.Tensor:
    """Return rows from sharp to flat, with a share of tokens forbidden; the first two tokens are always allowed."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(count, 1, generator=generator) * 6 + 0.1
    logits = torch.randn(count, vocab, generator=generator) * scale
    logits[:, 2:][torch.rand(count, vocab - 2, generator=generator) < masked] = -math.inf
    return logits


def expected(logits: torch.Tensor, params: Params) -> tuple[Row, int]:
    """Return (new logits, steps) by the reference for one row [vocab]."""
    row = logits.double().numpy()
    if isinstance(params, EMInfParams):
        return reference.em_inf(row, params)
    assert isinstance(params, AdaptiveTemperatureParams)
    t = reference.temperature(row, params)
    return row / t, int(reference.entropy(row) > params.threshold)


def total_variation(a: Row, b: Row) -> float:
    """Return the total variation distance between the distributions of two rows of logits."""
    return float(np.abs(reference.softmax(a) - reference.softmax(b)).sum() / 2)


def p_value(counts: npt.NDArray[np.int64], p: Row) -> float:
    """Return the p-value of a chi-square test; cells expected fewer than five times are pooled."""
    rare = p * counts.sum() < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(p[~rare], p[rare].sum()) * counts.sum()
    if expected[-1] < 1e-9:
        observed, expected = observed[:-1], expected[:-1]
        if observed.sum() != counts.sum():
            return 0.0
    if len(observed) == 1:  # one token alone can be sampled, and was
        return 1.0
    return float(stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


def eager_masked(logits: torch.Tensor, params: Rows, temperatures: Temperatures = None) -> TransformOutput:
    """Run the eager transform as on a GPU: it computes all rows and masks those that have nothing to do."""
    transform = EagerTransform(logits.shape[1], logits.device, max_rows=len(logits))
    transform.skip_idle_rows = False
    return transform(logits, BatchParams.of(params, logits.device, temperatures))


def numba_cpu(logits: torch.Tensor, params: Rows, temperatures: Temperatures = None) -> TransformOutput:
    """Run the Numba transform."""
    return numba_transform()(logits.shape[1])(logits, BatchParams.of(params, temperatures=temperatures))


def numba_transform() -> "type[NumbaTransform]":
    """Import the Numba transform. A machine with a GPU may have a Numba that does not fit its NumPy: skip the test."""
    try:
        from em_sampler.transforms.numba_cpu import NumbaTransform
    except ImportError as error:
        if DEVICE == "cpu":
            raise
        pytest.skip(f"Numba cannot be imported here: {error}")
    return NumbaTransform


def triton_cuda(logits: torch.Tensor, params: Rows, temperatures: Temperatures = None) -> TransformOutput:
    """Run the Triton transform: compiled if the logits are on a GPU, else by Triton's interpreter."""
    transform = TritonTransform(logits.shape[1], logits.device, max_rows=len(logits))
    return transform(logits, BatchParams.of(params, logits.device, temperatures))


class Implementation(Protocol):
    """One of the transforms, of a batch in place."""

    def __call__(self, logits: torch.Tensor, params: Rows, temperatures: Temperatures = None) -> TransformOutput: ...


def is_interpreted(name: str) -> bool:
    """Return whether Triton's interpreter runs this implementation: it takes seconds for a batch."""
    return name == "triton_cuda" and DEVICE == "cpu"


def on_device(implementation: Implementation) -> Implementation:
    """Return `implementation` for logits on the CPU, run on the device under test, where they lie as they do here."""

    def moved(logits: torch.Tensor, params: Rows, temperatures: Temperatures = None) -> TransformOutput:
        here = logits.new_empty(0).set_(logits.untyped_storage())
        there = here.to(DEVICE, copy=True)
        rows = there.as_strided(logits.shape, logits.stride(), logits.storage_offset())
        result = implementation(rows, params, temperatures)
        here.copy_(there)
        return TransformOutput(logits, result.stats.cpu())

    return moved


IMPLEMENTATIONS: dict[str, Implementation] = {
    "eager": eager.transform,
    "eager_masked": eager_masked,
    "numba_cpu": numba_cpu,
    "triton_cuda": triton_cuda,
}
if DEVICE != "cpu":
    IMPLEMENTATIONS = {"eager_masked": on_device(eager_masked), "triton_cuda": on_device(triton_cuda)}
