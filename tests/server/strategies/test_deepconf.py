"""DeepConf: the warm-up's threshold, branches that fall below it, and consensus."""

from typing import Any

import pytest

from server.strategies.branches import Branch
from server.strategies.registry import parse_strategy
from tests.server.strategies.scripted import Script, ScriptedEngine, ScriptedRun, box


def test_branches_below_the_warm_ups_threshold_are_cancelled() -> None:
    """The warm-up has four branches; the quantile 0.25 of their confidences lies between the lowest two."""
    warm = [Script(box(answer), 8, confidence=c) for answer, c in ((1, 4.0), (5, 3.0), (1, 2.0), (1, 1.0))]
    later = [Script(box(2), 9, confidence=0.5), Script(box(3), 9, confidence=5.0), Script(box(4), 3, confidence=0.5)]
    run = ScriptedRun(
        {"type": "deepconf", "n": 7, "warmup": 4, "window": 4, "keep": 0.75, "consensus": 1.0},
        ScriptedEngine(*warm, *later),
    ).play()
    assert run.summary["threshold"] == 1.75
    assert run.states() == ["completed"] * 4 + ["cancelled", "completed", "completed"]
    assert run.summary["completion_tokens"][4] in (4, 5)  # at its first full window
    # No vote for a branch of the warm-up below the threshold, nor for one that is too short for a window.
    assert run.summary["votes"] == {"1": 2, "3": 1, "5": 1}
    assert run.summary["agreement"] == pytest.approx(6 / 14, abs=1e-6)


@pytest.mark.parametrize(
    ("keep", "threshold"),
    [(0.9, 1.3), (0.5, 2.5), (0.1, 3.7), (1 / 3, 3.0)],  # linear between neighbours: 1 + 3 * (1 - keep)
)
def test_the_threshold_is_the_quantile_that_keep_lets_pass(keep: float, threshold: float) -> None:
    warm = [Script(box(i), confidence=c) for i, c in enumerate((3.0, 1.0, 4.0, 2.0))]
    settings = {"type": "deepconf", "n": 5, "warmup": 4, "keep": keep, "consensus": 1.0}
    run = ScriptedRun(settings, ScriptedEngine(*warm, Script(box(9)))).play()
    assert run.summary["threshold"] == pytest.approx(threshold, rel=1e-15)


def test_a_branchs_confidence_is_that_of_its_least_confident_group() -> None:
    sums = [0.0]
    for value in (5.0, 1.0, 1.0, 4.0, 6.0):
        sums.append(sums[-1] + value)
    branch = Branch(0)
    branch.confidence_sums = sums
    for window, least in ((1, 1.0), (2, 1.0), (3, 2.0), (5, 3.4), (9, 3.4)):
        strategy: Any = parse_strategy({"type": "deepconf", "window": window})
        assert strategy._confidence(branch) == pytest.approx(least)


def test_consensus_in_the_warm_up_makes_the_other_branches_unnecessary() -> None:
    run = ScriptedRun({"type": "deepconf", "n": 8, "warmup": 3}, ScriptedEngine(*[Script(box(1))] * 8)).play()
    assert len(run.run.branches.started) == 3
    assert run.metric("tokens_saved_total") == 5 * 3


def test_later_consensus_cancels_the_running_branches() -> None:
    scripts = [Script(box(1)), Script(box(2)), *[Script(box(1), 4)] * 4, *[Script(box(1), 500)] * 2]
    run = ScriptedRun({"type": "deepconf", "n": 8, "warmup": 2, "consensus": 0.8}, ScriptedEngine(*scripts)).play()
    assert run.states() == ["completed"] * 6 + ["cancelled"] * 2
