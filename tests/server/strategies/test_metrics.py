"""The metrics of strategies: what each event changes, and that docs/metrics.md says the same."""

import pytest
from prometheus_client import CollectorRegistry

from server.strategies.metrics import StrategyMetrics
from server.strategies.registry import STRATEGIES
from tests.server.metrics_page import STRATEGY_PREFIX, documented, exposed, series

COUNTERS = ("branches_started", "branches_completed", "branches_cancelled", "branches_failed", "tokens_saved")


def test_every_series_is_there_from_the_start_at_zero() -> None:
    registry = CollectorRegistry()
    StrategyMetrics("m", list(STRATEGIES), registry)
    shown = series(registry)
    assert set(shown.values()) == {0.0}
    for strategy in STRATEGIES:
        for name in (*(f"{counter}_total" for counter in COUNTERS), "branches_running", "agreement_sum"):
            assert (f"em_inf_strategy_{name}", "m", strategy) in shown


@pytest.mark.parametrize("state", ["completed", "cancelled", "failed"])
def test_a_branch_is_running_until_its_end(state: str) -> None:
    registry = CollectorRegistry()
    metrics = StrategyMetrics("m", list(STRATEGIES), registry)
    metrics.observe_start("deepconf")
    metrics.observe_start("deepconf")
    assert series(registry)["em_inf_strategy_branches_running", "m", "deepconf"] == 2
    metrics.observe_end("deepconf", state)
    assert {key: value for key, value in series(registry).items() if value} == {
        ("em_inf_strategy_branches_started_total", "m", "deepconf"): 2,
        ("em_inf_strategy_branches_running", "m", "deepconf"): 1,
        (f"em_inf_strategy_branches_{state}_total", "m", "deepconf"): 1,
    }


def test_only_a_strategy_that_votes_has_an_agreement() -> None:
    registry = CollectorRegistry()
    metrics = StrategyMetrics("m", list(STRATEGIES), registry)
    metrics.observe_result("refinement", None, 7.5)
    metrics.observe_result("self_consistency", 0.75, 2.0)
    changed = {key: value for key, value in series(registry).items() if value}
    assert {key: value for key, value in changed.items() if not key[0].endswith("_bucket")} == {
        ("em_inf_strategy_tokens_saved_total", "m", "refinement"): 7.5,
        ("em_inf_strategy_tokens_saved_total", "m", "self_consistency"): 2.0,
        ("em_inf_strategy_agreement_count", "m", "self_consistency"): 1,
        ("em_inf_strategy_agreement_sum", "m", "self_consistency"): 0.75,
    }
    assert ("em_inf_strategy_agreement_bucket", "0.7", "m", "self_consistency") not in changed
    assert changed["em_inf_strategy_agreement_bucket", "0.8", "m", "self_consistency"] == 1


def test_the_page_has_every_metric_and_no_other() -> None:
    registry = CollectorRegistry()
    StrategyMetrics("m", list(STRATEGIES), registry)
    assert sorted(row for row in documented() if row[0].startswith(STRATEGY_PREFIX)) == sorted(exposed(registry))
