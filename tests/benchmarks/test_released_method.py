"""The released method agrees with the reference."""

import numpy as np
import pytest
import torch

from benchmarks.released_method import ReleasedProcessor, released_method
from benchmarks.transform.logits import language_model_logits
from em_sampler import EMInfParams
from em_sampler.transforms import reference


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_it_agrees_with_the_reference(optimizer):
    params = EMInfParams(threshold=0.5, steps=8, kl_weight=0.01, optimizer=optimizer)
    logits = language_model_logits(4, 200, origin="float32")
    logits[0, 7] = -torch.inf
    found = released_method(logits, params)
    for row, got in zip(logits, found, strict=True):
        want, _ = reference.em_inf(row.double().numpy(), params)
        np.testing.assert_allclose(got.double().numpy(), want, atol=1e-4)
    with torch.no_grad():  # as `generate` runs it
        scores = ReleasedProcessor(params)(torch.zeros(4, 1, dtype=torch.long), logits)
    torch.testing.assert_close(scores, found)
