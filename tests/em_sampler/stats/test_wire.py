"""Totals over tokens, checked against a count in plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from em_sampler.params import CUT
from em_sampler.stats.wire import (
    ENTROPY_BUCKETS,
    HISTOGRAMS,
    SUMMED_FIELDS,
    TOKEN_DTYPE,
    TOTALS_DTYPE,
    VALUES_DTYPE,
    StructuredArray,
    add_tokens,
    add_totals,
)
from tests.em_sampler.stats.support import TokenStats

EDGES = [float(np.float32(edge)) for edge in ENTROPY_BUCKETS]
ABOVE = [float(np.nextafter(np.float32(edge), np.float32(np.inf))) for edge in ENTROPY_BUCKETS]
entropies = st.one_of(st.floats(0, 20, width=32), st.sampled_from(EDGES + ABOVE))
measured = st.tuples(
    entropies, entropies, st.one_of(st.floats(0, 20, width=32), st.just(math.nan)), st.integers(CUT, 64)
)
tokens = st.one_of(measured, st.just((math.nan, math.nan, math.nan, 0)))


def bucket(entropy: float) -> int:
    """The index of the first bucket whose upper bound is not below `entropy`."""
    return next((i for i, bound in enumerate(ENTROPY_BUCKETS) if entropy <= bound), len(ENTROPY_BUCKETS))


def recount(tokens: list[TokenStats]) -> dict[str, object]:
    measured = [(before, after) for before, after, _, _ in tokens if not math.isnan(before)]
    entropies = {
        "before": [before for before, _ in measured],
        "after": [after for _, after in measured],
        "reduction": [max(0.0, float(np.float32(before) - np.float32(after))) for before, after in measured],
    }
    varentropies = [varentropy for before, _, varentropy, _ in tokens if not math.isnan(before)]
    count: dict[str, object] = {
        "tokens": len(tokens),
        "optimized": sum(steps != 0 for _, _, _, steps in tokens),
        "steps": sum(max(steps, 0) for _, _, _, steps in tokens),
        "passed_through": len(tokens) - len(measured),
        "varentropy_sum": pytest.approx(math.fsum(varentropies), rel=1e-12, abs=1e-12, nan_ok=True),
    }
    for name, values in entropies.items():
        count[f"{name}_sum"] = pytest.approx(math.fsum(values), rel=1e-12, abs=1e-12)
        buckets = [bucket(entropy) for entropy in values]
        count[f"{name}_counts"] = [buckets.count(i) for i in range(len(ENTROPY_BUCKETS) + 1)]
    return count


def counted(row: np.void) -> dict[str, object]:
    return {name: row[name].tolist() for name in SUMMED_FIELDS}


def totals_of(values: list[TokenStats]) -> StructuredArray:
    totals = np.zeros(1, dtype=TOTALS_DTYPE)
    rows, tokens = np.zeros(len(values), dtype=np.intp), np.array(values, dtype=VALUES_DTYPE)
    add_tokens(totals, rows, tokens, np.arange(len(values)))
    return totals


@given(st.lists(st.tuples(st.integers(0, 3), tokens), max_size=40))
def test_tokens_are_counted_into_their_rows(tokens_of_rows: list[tuple[int, TokenStats]]) -> None:
    totals = np.zeros(4, dtype=TOTALS_DTYPE)
    rows = np.array([row for row, _ in tokens_of_rows], dtype=np.intp)
    values = np.array([values for _, values in tokens_of_rows], dtype=VALUES_DTYPE)
    add_tokens(totals, rows, values, np.arange(len(values)))
    for row in range(4):
        assert counted(totals[row]) == recount([values for other, values in tokens_of_rows if other == row])


@given(st.lists(tokens, max_size=30), st.lists(tokens, max_size=30))
def test_totals_add_up_to_those_of_all_tokens(some: list[TokenStats], others: list[TokenStats]) -> None:
    target = totals_of(some)
    add_totals(target, [totals_of(others)[0], totals_of([])[0]])
    assert counted(target[0]) == recount(some + others)


def test_adding_totals_leaves_the_target_s_choice_and_positions() -> None:
    target, other = totals_of([(1.0, 0.5, 0.25, 2)]), totals_of([(1.0, 0.5, 0.25, 2)])
    target["request_number"], target["choice"], target["first"], target["end"] = 7, 1, 3, 4
    other["request_number"], other["choice"], other["first"], other["end"] = 8, 2, 30, 40
    add_totals(target, [other[0]])
    assert [int(target[name][0]) for name in ("request_number", "choice", "first", "end", "tokens")] == [7, 1, 3, 4, 2]


@pytest.mark.parametrize("edge", [0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0])
def test_a_bucket_holds_its_upper_bound(edge: float) -> None:
    above = float(np.nextafter(np.float32(edge), np.float32(np.inf)))
    counts = totals_of([(edge, above, 0.0, 0)])[0]
    assert counts["before_counts"].nonzero()[0].tolist() == [ENTROPY_BUCKETS.index(edge)]
    assert counts["after_counts"].nonzero()[0].tolist() == [ENTROPY_BUCKETS.index(edge) + 1]


@given(st.lists(entropies, max_size=30))
def test_buckets_are_those_that_prometheus_chooses(values: list[float]) -> None:
    histogram = Histogram("entropy", "", registry=CollectorRegistry(), buckets=ENTROPY_BUCKETS)
    for entropy in values:
        histogram.observe(float(np.float32(entropy)))
    observed = [value.get() for value in histogram._buckets]
    assert totals_of([(entropy, 0.0, 0.0, 0) for entropy in values])["before_counts"][0].tolist() == observed


def test_a_token_that_was_not_measured_is_in_no_histogram() -> None:
    row = totals_of([(math.nan, math.nan, math.nan, 0)] * 3 + [(0.0, 0.0, 0.0, 0)])[0]
    assert (row["tokens"], row["passed_through"]) == (4, 3)
    for name in HISTOGRAMS:
        assert row[f"{name}_counts"].sum() == 1
        assert row[f"{name}_sum"] == 0.0


def test_an_entropy_that_rose_is_no_reduction() -> None:
    row = totals_of([(1.0, 1.25, 0.0, 1), (1.0, 0.5, 0.0, 1)])[0]
    assert row["reduction_sum"] == 0.5
    assert row["reduction_counts"].nonzero()[0].tolist() == [0, bucket(0.5)]


def test_tokens_with_their_place_are_counted_too() -> None:
    token = np.array([(5, 1, 9, 1.0, 0.5, 0.25, 2)], dtype=TOKEN_DTYPE)
    totals = np.zeros(1, dtype=TOTALS_DTYPE)
    add_tokens(totals, np.zeros(1, dtype=np.intp), token, token["position"])
    assert counted(totals[0]) == recount([(1.0, 0.5, 0.25, 2)])


@given(st.lists(st.tuples(st.integers(0, 2), tokens), max_size=30), st.integers(0, 30))
def test_totals_know_the_highest_entropy_and_where_it_is(
    tokens_of_rows: list[tuple[int, TokenStats]], cut: int
) -> None:
    """However the tokens come: all at once, or in two parts."""
    parts = [np.zeros(3, dtype=TOTALS_DTYPE) for _ in range(2)]
    for part, slice_ in zip(parts, (slice(cut), slice(cut, None)), strict=True):
        rows = np.array([row for row, _ in tokens_of_rows[slice_]], dtype=np.intp)
        values = np.array([values for _, values in tokens_of_rows[slice_]], dtype=VALUES_DTYPE)
        add_tokens(part, rows, values, np.arange(len(tokens_of_rows))[slice_])
    for row in range(3):
        add_totals(parts[0][row : row + 1], [parts[1][row]])
        entropies = {i: values[0] for i, (other, values) in enumerate(tokens_of_rows) if other == row and values[0] > 0}
        highest = max(entropies.values(), default=0.0)
        assert parts[0]["highest"][row] == highest
        assert not entropies or entropies[int(parts[0]["highest_position"][row])] == highest
