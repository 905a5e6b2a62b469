"""What only the Numba transform can get wrong: compilation, threads, what a row leaves behind, when it counts."""

from pathlib import Path

import pytest
import torch

from em_sampler import AdaptiveTemperatureParams, EMInfParams
from em_sampler.params import Params
from em_sampler.transforms import numba_cpu
from em_sampler.transforms.batch import BatchParams
from em_sampler.transforms.numba_cpu import MAX_OFF_GRID_SHARE, MIN_HISTOGRAM_VOCAB, NumbaTransform
from tests.em_sampler.transforms.support import expected, total_variation

MIXED: list[Params | None] = [EMInfParams(), AdaptiveTemperatureParams(), None, EMInfParams(optimizer="sgd")]


def bfloat16_rows(count: int, vocab: int) -> torch.Tensor:
    return (torch.randn(count, vocab, generator=torch.Generator().manual_seed(vocab)) * 3).bfloat16().float()


def test_building_compiles_everything() -> None:
    """One signature, whatever the batch: no request waits for the compiler."""
    transform = NumbaTransform(300)
    compiled = list(numba_cpu._transform_rows.signatures)
    for rows in (1, 7, 64):
        transform(bfloat16_rows(rows, 300), BatchParams.of((MIXED * 16)[:rows]))
    NumbaTransform(9000)(torch.randn(2, 9000), BatchParams.of(MIXED[:2]))
    padded = torch.randn(3, 400)
    with torch.inference_mode():
        transform(padded[:, :300], BatchParams.of(MIXED[:3]))
    assert numba_cpu._transform_rows.signatures == compiled
    assert len(compiled) == 1


def test_compiled_code_is_kept_for_the_next_start() -> None:
    NumbaTransform(300)
    stats = numba_cpu._transform_rows.stats
    assert sum(stats.cache_hits.values()) + sum(stats.cache_misses.values()) == 1
    assert any(Path(stats.cache_path).glob("numba_cpu._transform_rows*.nbi"))


def test_the_number_of_threads_changes_nothing() -> None:
    before = bfloat16_rows(24, 40_000)
    params = BatchParams.of(MIXED * 6)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(NumbaTransform(40_000)(before.clone(), params))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))


@pytest.mark.parametrize("share", [0.0, MAX_OFF_GRID_SHARE - 0.01, MAX_OFF_GRID_SHARE + 0.01, 0.5])
@pytest.mark.parametrize("params", [p for p in MIXED if p])
def test_values_that_bfloat16_cannot_represent(share: float, params: Params) -> None:
    """On both sides of the share above which a row is not counted; the next row finds the counts cleared."""
    vocab = 2 * MIN_HISTOGRAM_VOCAB
    before = bfloat16_rows(2, vocab)
    before[0, torch.randperm(vocab, generator=torch.Generator().manual_seed(3))[: int(share * vocab)]] /= 1.1
    transform = NumbaTransform(vocab)
    after = transform(before.clone(), BatchParams.of([params] * 2)).logits
    for row in range(2):
        z, _ = expected(before[row], params)
        assert total_variation(after[row].double().numpy(), z) < 1e-5
    assert not transform.workspaces[0].counts.any()


def test_equal_logits_stay_equal() -> None:
    before = bfloat16_rows(1, 50_000)
    after = NumbaTransform(50_000)(before.clone(), BatchParams.of([EMInfParams(threshold=0.0)])).logits
    values, value_of = before[0].unique(return_inverse=True)
    assert len(values) < 5000
    first = torch.full((len(values),), torch.nan).scatter(0, value_of, after[0])
    assert torch.equal(first[value_of], after[0])
