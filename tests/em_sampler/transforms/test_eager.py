"""The eager transform: its workspace, and its two ways to leave out rows with nothing to do."""

import math

import torch

from em_sampler import AdaptiveTemperatureParams, EMInfParams
from em_sampler.transforms import eager
from em_sampler.transforms.batch import BatchParams
from em_sampler.transforms.eager import EagerTransform
from tests.em_sampler.transforms.support import eager_masked, rows_of


def test_a_call_leaves_nothing_behind_in_the_workspace() -> None:
    transform = EagerTransform(1000, torch.device("cpu"), max_rows=4)
    before = rows_of(5, 20, 1000)  # five chunks
    first, second = before.clone(), before.clone()
    params = BatchParams.of([EMInfParams(), AdaptiveTemperatureParams()] * 10)
    transform(first, params)
    transform(rows_of(6, 20, 1000), params)
    transform(second, params)
    assert torch.equal(first, second)


def test_skipping_rows_and_masking_them_agree() -> None:
    before = rows_of(21, 30, 999)
    before[4, 4] = math.nan
    params = [EMInfParams(steps=9), None, AdaptiveTemperatureParams(), EMInfParams(optimizer="sgd")] * 7 + [None] * 2
    skipped, masked = eager.transform(before.clone(), params), eager_masked(before.clone(), params)
    for one, other in zip(skipped, masked, strict=True):
        assert torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0))
