"""What the tests of the transform share: distributions, and rows as the oracle sees them."""

import numpy as np
import numpy.typing as npt
import torch

from em_sampler import AdaptiveTemperatureParams, EMInfParams, oracle, transform
from em_sampler.params import Params
from em_sampler.rows import RowParams, Transformed
from em_sampler.torch_batched import BatchedTransform

Row = npt.NDArray[np.float64]


def expected(logits: torch.Tensor, params: Params) -> tuple[Row, int]:
    """(row, steps) by the oracle for one row [vocab]."""
    row = logits.double().numpy()
    if isinstance(params, EMInfParams):
        return oracle.em_inf(row, params)
    assert isinstance(params, AdaptiveTemperatureParams)
    t = oracle.temperature(row, params)
    return row / t, int(oracle.entropy(row) > params.threshold)


def total_variation(a: Row, b: Row) -> float:
    return float(np.abs(oracle.softmax(a) - oracle.softmax(b)).sum() / 2)


def transform_masked(logits: torch.Tensor, params: list[Params | None]) -> Transformed:
    """`transform` as it runs where asking the device would wait: all rows are computed, those without work masked."""
    engine = BatchedTransform(logits.shape[1], logits.device, max_rows=len(logits))
    engine.compact = False
    return engine(logits, RowParams.of(params, logits.device))


FORMS = {"compact": transform, "masked": transform_masked}
