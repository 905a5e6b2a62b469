"""Every method on as many words as a real model has, in one batch: against the reference, and what torch samples."""

from collections import Counter

import numpy as np
import pytest
import torch

from em_sampler.params import AdaptiveTemperatureParams, EMInfParams, MeasureParams, Params, TruncationParams
from em_sampler.transforms import reference
from tests.em_sampler.transforms.support import (
    FLOAT32_DRIFT,
    IMPLEMENTATIONS,
    Row,
    expected,
    is_interpreted,
    p_value,
    rows_of,
    total_variation,
)
from tests.em_sampler.transforms.test_truncation import METHODS, check

VOCAB = 151_936  # of Qwen2.5
SAMPLES = 20_000
TEMPERATURES = 0.25, 1.0, 2.0
EVERY_METHOD: list[Params] = [
    *METHODS.values(),
    EMInfParams(threshold=0.0),
    EMInfParams(threshold=0.5, steps=15, optimizer="sgd", learning_rate=0.5),
    AdaptiveTemperatureParams(),
    MeasureParams(),
]
each_implementation = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith("eager") else ())
        for name in IMPLEMENTATIONS
        if not is_interpreted(name)  # which would take minutes
    ],
)
each_origin = pytest.mark.parametrize("on_grid", [True, False], ids=["bfloat16", "float32"])


def mixed_batch(on_grid: bool, scale: float | None = None) -> tuple[torch.Tensor, list[Params], list[float]]:
    """Return rows of which a twentieth is masked, their params and temperatures: each method at each temperature."""
    params = [each for each in EVERY_METHOD for _ in TEMPERATURES]
    rows = rows_of(23, len(params), VOCAB, masked=0.05)
    if scale is not None:
        rows *= scale / torch.where(rows.isfinite(), rows, 0).std(1, keepdim=True)
    return rows.bfloat16().float() if on_grid else rows, params, [*TEMPERATURES] * len(EVERY_METHOD)


def expected_row(row: torch.Tensor, params: Params, temperature: float) -> Row:
    """Return a row [vocab] after a method, by the reference."""
    logits = row.double().numpy()
    if isinstance(params, TruncationParams):
        return np.where(reference.kept(logits, params, temperature), logits, -np.inf)
    return logits if isinstance(params, MeasureParams) else expected(row, params)[0]


@each_implementation
@each_origin
def test_all_methods_share_a_batch(on_grid: bool, implementation: str) -> None:
    before, params, temperatures = mixed_batch(on_grid)
    result = IMPLEMENTATIONS[implementation](before.clone(), params, temperatures)
    for index, (wanted, temperature) in enumerate(zip(params, temperatures, strict=True)):
        if isinstance(wanted, TruncationParams):
            check(before[index], result, index, wanted, temperature)
            continue
        after = result.logits[index].double().numpy()
        assert total_variation(after, expected_row(before[index], wanted, temperature)) < FLOAT32_DRIFT, wanted
        assert np.array_equal(np.isneginf(after), before[index].isneginf().numpy())


@each_origin
def test_torch_samples_what_the_reference_expects(on_grid: bool) -> None:
    """By chi-square, of rows whose likeliest token has a few per cent; and not what the row was before."""
    fastest = "numba_cpu" if "numba_cpu" in IMPLEMENTATIONS else "triton_cuda"
    before, params, temperatures = mixed_batch(on_grid, scale=2.5)
    after = IMPLEMENTATIONS[fastest](before.clone(), params, temperatures).logits
    generator = torch.Generator().manual_seed(5)
    differ: Counter[str] = Counter()
    for row, sampled_from, wanted, temperature in zip(before, after, params, temperatures, strict=True):
        p = (sampled_from / temperature).softmax(-1)
        counts = torch.multinomial(p, SAMPLES, replacement=True, generator=generator).bincount(minlength=VOCAB).numpy()
        case = f"{wanted}, temperature {temperature}"
        assert p_value(counts, reference.softmax(expected_row(row, wanted, temperature) / temperature)) > 1e-4, case
        differ[wanted.method] += p_value(counts, reference.softmax(row.double().numpy() / temperature)) < 1e-4
    assert {method for method in differ if differ[method]} == {p.method for p in params} - {"none"}
