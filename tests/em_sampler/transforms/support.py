"""What the tests of the transform share: distributions, and rows as the oracle sees them."""

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from em_sampler import AdaptiveTemperatureParams, EMInfParams, transform
from em_sampler.params import Params
from em_sampler.transforms import reference
from em_sampler.transforms.batch import BatchParams, TransformOutput
from em_sampler.transforms.eager import EagerTransform
from em_sampler.transforms.numba_cpu import NumbaTransform
from em_sampler.transforms.triton_cuda import TritonTransform

Row = npt.NDArray[np.float64]
DEVICE = os.environ.get("EM_TEST_DEVICE", "cpu")  # benchmarks/gpu.sh asks for "cuda"


def expected(logits: torch.Tensor, params: Params) -> tuple[Row, int]:
    """(row, steps) by the oracle for one row [vocab]."""
    row = logits.double().numpy()
    if isinstance(params, EMInfParams):
        return reference.em_inf(row, params)
    assert isinstance(params, AdaptiveTemperatureParams)
    t = reference.temperature(row, params)
    return row / t, int(reference.entropy(row) > params.threshold)


def total_variation(a: Row, b: Row) -> float:
    return float(np.abs(reference.softmax(a) - reference.softmax(b)).sum() / 2)


def transform_masked(logits: torch.Tensor, params: list[Params | None]) -> TransformOutput:
    """`transform` as it runs where asking the device would wait: all rows are computed, those without work masked."""
    engine = EagerTransform(logits.shape[1], logits.device, max_rows=len(logits))
    engine.compact = False
    return engine(logits, BatchParams.of(params, logits.device))


def transform_counted(logits: torch.Tensor, params: list[Params | None]) -> TransformOutput:
    """`transform` by counting distinct values, on the CPU."""
    return NumbaTransform(logits.shape[1])(logits, BatchParams.of(params))


def transform_fused(logits: torch.Tensor, params: list[Params | None]) -> TransformOutput:
    """`transform` by the CUDA kernels: compiled where the logits are on a GPU, else under Triton's interpreter."""
    engine = TritonTransform(logits.shape[1], logits.device, max_rows=len(logits))
    return engine(logits, BatchParams.of(params, logits.device))


Form = Callable[[torch.Tensor, list[Params | None]], TransformOutput]


def on_device(form: Form) -> Form:
    """`form` on the device that is tested, for logits on the CPU."""

    def moved(logits: torch.Tensor, params: list[Params | None]) -> TransformOutput:
        there = logits.to(DEVICE)
        result = form(there, params)
        if there is not logits:
            logits.copy_(there)
        return TransformOutput(logits, result.statistics.cpu())

    return moved


FORMS = {"compact": transform, "masked": transform_masked, "counted": transform_counted, "fused": transform_fused}
if DEVICE != "cpu":
    FORMS = {"masked": on_device(transform_masked), "fused": on_device(transform_fused)}
