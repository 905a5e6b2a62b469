"""Records and totals against a count in plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

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

EDGES = [float(np.float32(edge)) for edge in ENTROPY_BUCKETS]
ABOVE = [float(np.nextafter(np.float32(edge), np.float32(np.inf))) for edge in ENTROPY_BUCKETS]
entropies = st.one_of(st.floats(0, 20, width=32), st.sampled_from(EDGES + ABOVE))
measured = st.tuples(entropies, entropies, st.integers(0, 64))
tokens = st.one_of(measured, st.just((math.nan, math.nan, 0)))


def bucket(entropy: float) -> int:
    """The first bucket whose upper bound is not below it."""
    return next((i for i, bound in enumerate(ENTROPY_BUCKETS) if entropy <= bound), len(ENTROPY_BUCKETS))


def recount(values: list[tuple[float, float, int]]) -> dict[str, object]:
    seen = [(before, after, steps) for before, after, steps in values if not math.isnan(before)]
    columns = {
        "before": [before for before, _, _ in seen],
        "after": [after for _, after, _ in seen],
        "reduction": [max(0.0, float(np.float32(before) - np.float32(after))) for before, after, _ in seen],
    }
    count: dict[str, object] = {
        "tokens": len(values),
        "optimized": sum(steps > 0 for _, _, steps in values),
        "steps": sum(steps for _, _, steps in values),
        "passed_through": len(values) - len(seen),
    }
    for name, column in columns.items():
        count[f"{name}_sum"] = pytest.approx(math.fsum(column), rel=1e-12, abs=1e-12)
        places = [bucket(entropy) for entropy in column]
        count[f"{name}_counts"] = [places.count(i) for i in range(len(ENTROPY_BUCKETS) + 1)]
    return count


def counted(row: np.void) -> dict[str, object]:
    return {name: row[name].tolist() for name in SUMMED_FIELDS}


def totals_of(values: list[tuple[float, float, int]]) -> StructuredArray:
    totals = np.zeros(1, dtype=TOTALS_DTYPE)
    add_tokens(totals, np.zeros(len(values), dtype=np.intp), np.array(values, dtype=VALUES_DTYPE))
    return totals


@given(st.lists(st.tuples(st.integers(0, 3), tokens), max_size=40))
def test_tokens_are_counted_into_their_rows(placed: list[tuple[int, tuple[float, float, int]]]) -> None:
    totals = np.zeros(4, dtype=TOTALS_DTYPE)
    rows = np.array([row for row, _ in placed], dtype=np.intp)
    add_tokens(totals, rows, np.array([values for _, values in placed], dtype=VALUES_DTYPE))
    for row in range(4):
        assert counted(totals[row]) == recount([values for place, values in placed if place == row])


@given(st.lists(tokens, max_size=30), st.lists(tokens, max_size=30))
def test_totals_add_up_to_those_of_all_tokens(some: list[tuple[float, float, int]], others: list[tuple]) -> None:
    target = totals_of(some)
    add_totals(target, [totals_of(others)[0], totals_of([])[0]])
    assert counted(target[0]) == recount(some + others)


def test_adding_totals_leaves_the_target_s_own_place() -> None:
    target, other = totals_of([(1.0, 0.5, 2)]), totals_of([(1.0, 0.5, 2)])
    target["request"], target["choice"], target["first"], target["upto"] = 7, 1, 3, 4
    other["request"], other["choice"], other["first"], other["upto"] = 8, 2, 30, 40
    add_totals(target, [other[0]])
    assert [int(target[name][0]) for name in ("request", "choice", "first", "upto", "tokens")] == [7, 1, 3, 4, 2]


@pytest.mark.parametrize("edge", [0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0])
def test_a_bucket_holds_its_upper_bound(edge: float) -> None:
    above = float(np.nextafter(np.float32(edge), np.float32(np.inf)))
    counts = totals_of([(edge, above, 0)])[0]
    assert counts["before_counts"].nonzero()[0].tolist() == [ENTROPY_BUCKETS.index(edge)]
    assert counts["after_counts"].nonzero()[0].tolist() == [ENTROPY_BUCKETS.index(edge) + 1]


@given(st.lists(entropies, max_size=30))
def test_buckets_are_those_that_prometheus_would_choose(values: list[float]) -> None:
    histogram = Histogram("entropy", "", registry=CollectorRegistry(), buckets=ENTROPY_BUCKETS)
    for entropy in values:
        histogram.observe(float(np.float32(entropy)))
    observed = [value.get() for value in histogram._buckets]
    assert totals_of([(entropy, 0.0, 0) for entropy in values])["before_counts"][0].tolist() == observed


def test_a_token_that_was_not_measured_is_in_no_histogram() -> None:
    row = totals_of([(math.nan, math.nan, 0)] * 3 + [(0.0, 0.0, 0)])[0]
    assert (row["tokens"], row["passed_through"]) == (4, 3)
    for name in HISTOGRAMS:
        assert row[f"{name}_counts"].sum() == 1
        assert row[f"{name}_sum"] == 0.0


def test_an_entropy_that_rose_is_no_reduction() -> None:
    row = totals_of([(1.0, 1.25, 1), (1.0, 0.5, 1)])[0]
    assert row["reduction_sum"] == 0.5
    assert row["reduction_counts"].nonzero()[0].tolist() == [0, bucket(0.5)]


def test_tokens_of_both_kinds_of_record_are_counted() -> None:
    record = np.array([(5, 1, 9, 1.0, 0.5, 2)], dtype=TOKEN_DTYPE)
    totals = np.zeros(1, dtype=TOTALS_DTYPE)
    add_tokens(totals, np.zeros(1, dtype=np.intp), record)
    assert counted(totals[0]) == recount([(1.0, 0.5, 2)])
