"""The reference and all implementations against 48 cases from an independent float64 autograd implementation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from em_sampler import AdaptiveTemperatureParams, EMInfParams
from em_sampler.transforms import reference
from tests.em_sampler.transforms.support import IMPLEMENTATIONS, total_variation

GOLDEN = np.load(Path(__file__).with_name("golden.npz"))
CASES = range(int(GOLDEN["n"]))


def value(case: int, name: str) -> Any:
    return GOLDEN[f"{case}/{name}"].item()


def em_params(case: int) -> EMInfParams:
    return EMInfParams(
        threshold=value(case, "em_threshold"),
        steps=value(case, "em_max_steps"),
        learning_rate=value(case, "em_lr"),
        kl_weight=value(case, "em_kl"),
        optimizer=value(case, "em_optimizer"),
    )


def adaptive_params(case: int) -> AdaptiveTemperatureParams:
    return AdaptiveTemperatureParams(
        ratio=value(case, "at_ratio"),
        threshold=value(case, "at_threshold"),
        min_temperature=value(case, "at_tmin"),
        max_temperature=value(case, "at_tmax"),
    )


@pytest.mark.parametrize("case", CASES)
def test_the_reference_matches_the_golden_cases(case: int) -> None:
    logits, out = GOLDEN[f"{case}/logits"].astype(np.float64), GOLDEN[f"{case}/em_out"]
    z, steps = reference.em_inf(logits, em_params(case))
    finite = np.isfinite(out)
    assert np.array_equal(np.isfinite(z), finite)
    assert np.abs(z[finite] - out[finite]).max() < 1e-9
    assert steps == value(case, "em_steps")
    assert reference.entropy(logits) == pytest.approx(value(case, "h_before"), abs=1e-9)
    assert reference.entropy(z) == pytest.approx(value(case, "h_after"), abs=1e-9)
    assert reference.temperature(logits, adaptive_params(case)) == pytest.approx(
        value(case, "at_temperature"), rel=1e-9
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_implementation_matches_the_golden_cases(case: int, implementation: str) -> None:
    row = torch.tensor(GOLDEN[f"{case}/logits"])
    logits = torch.stack([row, row, row])
    result = IMPLEMENTATIONS[implementation](logits, [em_params(case), None, adaptive_params(case)])

    out = GOLDEN[f"{case}/em_out"]
    z = logits[0].double().numpy()
    finite = np.isfinite(out)
    assert np.array_equal(np.isneginf(z), ~finite)
    assert np.abs(z[finite] - out[finite]).max() < 1e-3
    assert total_variation(z, out) < 1e-5
    assert result.steps[0] == value(case, "em_steps")
    assert result.entropy_before[0].item() == pytest.approx(value(case, "h_before"), abs=2e-5)
    assert result.entropy_after[0].item() == pytest.approx(value(case, "h_after"), abs=2e-5)

    assert torch.equal(logits[1], row)

    cooled, at_out = logits[2].double().numpy(), GOLDEN[f"{case}/at_out"]
    assert total_variation(cooled, at_out) < 1e-5
    assert np.allclose(cooled[finite], at_out[finite], rtol=1e-3, atol=1e-6)
