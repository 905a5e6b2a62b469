"""What each event changes on /metrics, and that docs/metrics.md says the same."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.multiprocess import MultiProcessCollector

from em_sampler.stats.wire import ENTROPY_BUCKETS, HISTOGRAMS, TOTALS_DTYPE, VALUES_DTYPE, StructuredArray, add_tokens
from server.stats.metrics import OUTCOMES, BulkHistogram, Metrics
from tests.server.metrics_page import PAGE, STRATEGY_PREFIX, documented, exposed, series

TRANSFORMS = [{"transform": "triton_cuda", "device": "cuda"}, {"transform": "eager", "device": "cuda"}]
METHODS = ("em_inf", "adaptive_temperature", "none", "p_less", "top_h", "top_n_sigma", "greedy_below")


def totals_of(*tokens: tuple[float, float, int]) -> StructuredArray:
    """TOTALS [1] of (entropy before, entropy after, steps) of tokens."""
    totals = np.zeros(1, dtype=TOTALS_DTYPE)
    values = np.array([(before, after, 0.0, steps) for before, after, steps in tokens], dtype=VALUES_DTYPE)
    add_tokens(totals, np.zeros(len(tokens), dtype=np.intp), values, np.arange(len(tokens)))
    return totals


@settings(max_examples=50)
@given(st.lists(st.lists(st.one_of(st.floats(0, 20, width=32), st.sampled_from([1.0, 12.0, 0.5])), max_size=20)))
def test_observations_in_bulk_are_those_made_one_by_one(batches: list[list[float]]) -> None:
    registry = CollectorRegistry()
    bulk = BulkHistogram("bulk", "", ("model",), registry=registry, buckets=ENTROPY_BUCKETS)
    single = Histogram("single", "", ("model",), registry=registry, buckets=ENTROPY_BUCKETS)
    for histogram in (bulk, single):
        histogram.labels("m")
    for batch in batches:
        totals = totals_of(*((entropy, 0.0, 1) for entropy in batch))[0]
        bulk.labels("m").add(totals["before_counts"], float(totals["before_sum"]))
        for entropy in batch:
            single.labels("m").observe(entropy)
    shown = series(registry)
    in_bulk = {key[1:]: value for key, value in shown.items() if key[0] == "bulk_bucket"}
    assert in_bulk == {key[1:]: value for key, value in shown.items() if key[0] == "single_bucket"}
    assert len(in_bulk) == len(ENTROPY_BUCKETS) + 1
    assert shown["bulk_count", "m"] == shown["single_count", "m"] == sum(map(len, batches))
    assert shown["bulk_sum", "m"] == pytest.approx(shown["single_sum", "m"])


def test_every_series_is_there_from_the_start_at_zero() -> None:
    registry = CollectorRegistry()
    Metrics("m", registry)
    shown = series(registry)
    assert set(shown.values()) == {0.0}
    for method in METHODS:
        for outcome in OUTCOMES:
            assert ("em_inf_requests_total", method, "m", outcome) in shown
        for name in ("tokens", "optimized_tokens", "steps", "passed_through_tokens", "missing_tokens"):
            assert (f"em_inf_{name}_total", method, "m") in shown
        for name in (*HISTOGRAMS, "max"):
            assert (f"em_inf_entropy_{name}_nats_bucket", "+Inf", method, "m") in shown
            assert (f"em_inf_entropy_{name}_nats_sum", method, "m") in shown
    assert ("em_inf_tracked_requests", "m") in shown
    assert ("em_inf_records_dropped_total", "m") in shown
    assert ("em_inf_transform_seconds_total", "m") in shown


def test_every_transform_of_the_workers_is_shown() -> None:
    registry = CollectorRegistry()
    Metrics("m", registry, TRANSFORMS)
    shown = series(registry)
    assert [shown["em_inf_transform_info", "cuda", "m", name] for name in ("triton_cuda", "eager")] == [1, 1]


def test_a_choice_is_counted_under_its_method() -> None:
    registry = CollectorRegistry()
    metrics = Metrics("m", registry)
    before = series(registry)
    metrics.observe_choice(
        "em_inf", totals_of((2.5, 0.25, 5), (0.25, 0.25, 0), (1.0, 0.5, 3), (math.nan, math.nan, 0)), 2
    )
    metrics.observe_choice("em_inf", totals_of((1.5, 1.25, 1)), 0)
    changed = {key: value for key, value in series(registry).items() if value != before[key]}
    assert {key: value for key, value in changed.items() if not key[0].endswith("_bucket")} == {
        ("em_inf_tokens_total", "em_inf", "m"): 5,
        ("em_inf_optimized_tokens_total", "em_inf", "m"): 3,
        ("em_inf_steps_total", "em_inf", "m"): 9,
        ("em_inf_passed_through_tokens_total", "em_inf", "m"): 1,
        ("em_inf_missing_tokens_total", "em_inf", "m"): 2,
        ("em_inf_entropy_before_nats_count", "em_inf", "m"): 4,
        ("em_inf_entropy_before_nats_sum", "em_inf", "m"): 5.25,
        ("em_inf_entropy_after_nats_count", "em_inf", "m"): 4,
        ("em_inf_entropy_after_nats_sum", "em_inf", "m"): 2.25,
        ("em_inf_entropy_max_nats_count", "em_inf", "m"): 2,
        ("em_inf_entropy_max_nats_sum", "em_inf", "m"): 4.0,
        ("em_inf_entropy_reduction_nats_count", "em_inf", "m"): 4,
        ("em_inf_entropy_reduction_nats_sum", "em_inf", "m"): 3.0,
    }
    at_most = {bound: changed.get(("em_inf_entropy_before_nats_bucket", bound, "em_inf", "m"), 0) for bound in
               ("0.2", "0.3", "0.75", "1.0", "1.5", "2.0", "3.0", "+Inf")}  # fmt: skip
    assert at_most == {"0.2": 0, "0.3": 1, "0.75": 1, "1.0": 2, "1.5": 3, "2.0": 3, "3.0": 4, "+Inf": 4}


def test_requests_and_workers_are_counted() -> None:
    registry = CollectorRegistry()
    metrics = Metrics("m", registry)
    before = series(registry)
    for _ in range(2):
        metrics.observe_request("none", "aborted")
    metrics.observe_request("unknown", "rejected")
    metrics.observe_worker(seconds=0.75, dropped=3)
    metrics.observe_worker(seconds=0.25, dropped=1)
    assert {key: value for key, value in series(registry).items() if value != before.get(key, 0)} == {
        ("em_inf_requests_total", "none", "m", "aborted"): 2,
        ("em_inf_requests_total", "unknown", "m", "rejected"): 1,
        ("em_inf_transform_seconds_total", "m"): 1.0,
        ("em_inf_records_dropped_total", "m"): 4,
    }


PROCESS = """
import sys
import numpy as np
from em_sampler.stats.wire import TOTALS_DTYPE, VALUES_DTYPE, add_tokens
from server.stats.metrics import Metrics

metrics, totals = Metrics("m"), np.zeros(1, dtype=TOTALS_DTYPE)
tokens = np.array([(2.5, 0.5, 0.0, 5), (float(sys.argv[1]), 0.25, 0.0, 1)], dtype=VALUES_DTYPE)
add_tokens(totals, np.zeros(2, dtype=np.intp), tokens, np.arange(2))
metrics.observe_choice("em_inf", totals, 1)
metrics.observe_request("em_inf", "completed")
metrics.tracked.labels("m").set(3)
"""


def test_several_processes_are_summed(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    root = Path(__file__).parents[3]
    commands = [[sys.executable, "-c", PROCESS, entropy] for entropy in ("0.25", "1.75")]
    started = [subprocess.Popen(command, env=environment, cwd=root) for command in commands]
    assert [process.wait() for process in started] == [0, 0]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))  # type: ignore[no-untyped-call]
    shown = series(registry)
    assert shown["em_inf_requests_total", "em_inf", "m", "completed"] == 2
    assert shown["em_inf_requests_total", "none", "m", "aborted"] == 0
    assert shown["em_inf_tracked_requests", "m"] == 6
    assert shown["em_inf_tokens_total", "em_inf", "m"] == 4
    assert shown["em_inf_steps_total", "em_inf", "m"] == 12
    assert shown["em_inf_missing_tokens_total", "em_inf", "m"] == 2
    assert shown["em_inf_entropy_before_nats_sum", "em_inf", "m"] == 7.0
    assert shown["em_inf_entropy_before_nats_count", "em_inf", "m"] == 4
    assert shown["em_inf_entropy_before_nats_bucket", "0.3", "em_inf", "m"] == 1
    assert shown["em_inf_entropy_before_nats_bucket", "2.0", "em_inf", "m"] == 2
    assert shown["em_inf_entropy_before_nats_bucket", "3.0", "em_inf", "m"] == 4


def test_the_page_has_every_metric_and_no_other() -> None:
    registry = CollectorRegistry()
    Metrics("m", registry, TRANSFORMS)
    assert sorted(row for row in documented() if not row[0].startswith(STRATEGY_PREFIX)) == sorted(exposed(registry))


def test_the_page_names_the_buckets() -> None:
    (bounds,) = re.findall(r"buckets end at ([\d., \n]+) nats", PAGE.read_text())
    assert tuple(float(bound) for bound in bounds.replace(",", " ").split()) == ENTROPY_BUCKETS
