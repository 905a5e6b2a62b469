"""Candidates of watched rows, against sorting in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from em_sampler.params import MAX_TOP
from em_sampler.stats.candidates import Watch
from em_sampler.transforms.reference import softmax

INF, NAN = float("inf"), float("nan")


def candidates(before: list[float], after: list[float]) -> list[tuple[int, float, float]]:
    """(id, probability before, after) of each candidate of one row."""
    logits = torch.tensor([before, [0.0] * len(before)])
    watch = Watch.of(logits, np.array([0]))
    assert watch is not None
    logits[0] = torch.tensor(after)
    ids, *probabilities = watch.candidates(logits)[:, 0]
    found: list[tuple[int, float, float]] = list(
        zip(ids.tolist(), *(p.view(torch.float32).tolist() for p in probabilities), strict=True)
    )
    assert len(found) == min(MAX_TOP, len(before))
    return [each for each in found if not np.isnan(each[1])]


def p(logits: list[float]) -> NDArray[np.float64]:
    return softmax(np.array(logits, dtype=np.float64))


@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(0, 3), st.integers(0, 50))
def test_the_likeliest_come_first_and_then_those_that_were_removed(
    seed: int, words: int, forbidden: int, removed: int
) -> None:
    make = np.random.default_rng(seed)
    before = make.normal(scale=4, size=words).astype(np.float32)
    before[make.permutation(words)[: min(forbidden, words - 1)]] = -INF
    after = before * np.float32(1.5)
    after[np.argsort(before)[: min(removed, words - 1)]] = -INF  # the least likely, as a method does
    ids, was, now = zip(*candidates(before.tolist(), after.tolist()), strict=True)
    order = [int(i) for i in np.argsort(-before) if np.isfinite(before[i])]
    assert list(ids) == order[:MAX_TOP]
    assert was == pytest.approx(p(before.tolist())[[*ids]], rel=1e-5, abs=1e-12)
    assert now == pytest.approx(p(after.tolist())[[*ids]], rel=1e-5, abs=1e-12)


def test_a_method_may_change_the_order() -> None:
    assert [each[0] for each in candidates([3.0, 2.0, 1.0, 0.0], [1.0, 4.0, -INF, 2.0])] == [1, 3, 0, 2]


def test_removed_tokens_keep_their_probability_before() -> None:
    [top, *others] = candidates([1.0, 3.0, 2.0], [-INF, 3.0, -INF])
    assert (top[0], top[2], [each[0] for each in others], [each[2] for each in others]) == (1, 1.0, [2, 0], [0.0, 0.0])
    assert [each[1] for each in (top, *others)] == pytest.approx(sorted(p([1, 3, 2]), reverse=True))


@pytest.mark.parametrize("row", [[NAN, 1.0, 2.0], [INF, 1.0, 2.0], [-INF, -INF, -INF]])
def test_a_row_that_cannot_be_measured_has_none(row: list[float]) -> None:
    assert candidates(row, row) == []


def test_no_rows_need_no_watch() -> None:
    assert Watch.of(torch.zeros(2, 3), np.zeros(0, dtype=np.int64)) is None
