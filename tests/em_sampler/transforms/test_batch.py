"""How a batch's params are packed, and which batches are refused."""

from collections.abc import Callable

import pytest
import torch

from em_sampler import AdaptiveTemperatureParams, EMInfParams, MeasureParams
from em_sampler.params import GreedyBelowParams, PLessParams, TopHParams, TopNSigmaParams
from em_sampler.transforms import dispatch, eager
from em_sampler.transforms.batch import BatchParams, Column, Method

EM = EMInfParams(threshold=0.5, steps=7, learning_rate=0.25, kl_weight=0.125, optimizer="sgd")
ADAPTIVE = AdaptiveTemperatureParams(ratio=0.25, threshold=0.75, min_temperature=0.5, max_temperature=2.0)


def test_every_param_has_its_column() -> None:
    batch = BatchParams.of([EM, EMInfParams(), ADAPTIVE, MeasureParams(stats="summary"), None])
    assert batch.values.dtype == torch.float32
    assert batch.values.shape == (5, len(Column))
    columns = {column: batch[column].squeeze(1).tolist() for column in Column}
    assert columns == {
        Column.METHOD: [Method.EM_INF, Method.EM_INF, Method.ADAPTIVE_TEMPERATURE, Method.MEASURE, Method.OFF],
        Column.THRESHOLD: pytest.approx([0.5, 0.3, 0.75, 0, 0]),
        Column.STEPS: [7, 5, 0, 0, 0],
        Column.LEARNING_RATE: pytest.approx([0.25, 0.1, 0, 0, 0]),
        Column.KL_WEIGHT: pytest.approx([0.125, 0.001, 0, 0, 0]),
        Column.ADAM: [0, 1, 0, 0, 0],
        Column.RATIO: [0, 0, 0.25, 0, 0],
        Column.MIN_TEMPERATURE: [0, 0, 0.5, 0, 0],
        Column.MAX_TEMPERATURE: [0, 0, 2, 0, 0],
        Column.TEMPERATURE: [1, 1, 1, 1, 0],
        Column.STATS: [0, 0, 0, 1, 0],
        **dict.fromkeys((Column.NORMALIZED, Column.ALPHA, Column.N, Column.P_MAX), [0] * 5),
    }


def test_every_param_of_a_method_that_removes_tokens_has_its_column() -> None:
    params = [PLessParams(normalized=True), TopHParams(alpha=0.25), TopNSigmaParams(n=2), GreedyBelowParams(p_max=0.5)]
    batch = BatchParams.of([*params, params[0]], temperatures=[0.5, 1, 2, 0.25, 0])
    used = (Column.NORMALIZED, Column.ALPHA, Column.N, Column.P_MAX, Column.TEMPERATURE, Column.METHOD)
    assert {column: batch[column].squeeze(1).tolist() for column in used} == {
        Column.METHOD: [Method.P_LESS, Method.TOP_H, Method.TOP_N_SIGMA, Method.GREEDY_BELOW, Method.MEASURE],
        Column.NORMALIZED: [1, 0, 0, 0, 1],
        Column.ALPHA: [0, 0.25, 0, 0, 0],
        Column.N: [0, 0, 2, 0, 0],
        Column.P_MAX: [0, 0, 0, 0.5, 0],
        Column.TEMPERATURE: [0.5, 1, 2, 0.25, 0],
    }


def test_the_host_knows_the_limits_of_a_batch() -> None:
    batch = BatchParams.of([EM, EMInfParams(steps=3), None])
    assert batch.max_steps == 7
    assert batch.methods == {"em_inf"}
    batch = BatchParams.of([ADAPTIVE, MeasureParams()])
    assert (batch.max_steps, batch.methods) == (0, {"adaptive_temperature", "none"})


def test_a_row_of_none_has_no_method() -> None:
    assert (BatchParams.of([None, None]).values[:, Column.METHOD] == Method.OFF).all()
    assert (BatchParams.of([None]).max_steps, BatchParams.of([None]).methods) == (0, frozenset())


def test_rows_can_be_selected() -> None:
    batch = BatchParams.of([EM, ADAPTIVE, None])
    selected = batch.select(torch.tensor([2, 0]))
    assert torch.equal(selected.values, batch.values[[2, 0]])
    assert (selected.max_steps, selected.methods) == (7, {"em_inf", "adaptive_temperature"})


@pytest.mark.parametrize("function", [dispatch.transform, eager.transform])
@pytest.mark.parametrize(
    ("logits", "count", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), 2, "float32, got .*float64"),
        (torch.zeros(3), 1, r"\[rows, vocab\]"),
        (torch.zeros(2, 0), 2, r"got \[2, 0\]"),
        (torch.zeros(2, 3), 3, "got 3 for 2 rows"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    logits: torch.Tensor, count: int, message: str, function: Callable[..., object]
) -> None:
    with pytest.raises(ValueError, match=message):
        function(logits, [None] * count)
