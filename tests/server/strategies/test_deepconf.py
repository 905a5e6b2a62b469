"""DeepConf: the warm-up's threshold, branches that fall below it, and consensus."""

import itertools
import json
from types import SimpleNamespace as Namespace
from typing import Any

import pytest

from em_sampler.validation import ParamsError
from server.strategies.branches import Branch
from server.strategies.deepconf import quantile
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


def with_confidences(*values: float) -> Branch:
    """Return a branch whose tokens have these confidences."""
    branch = Branch(0)
    completion = Namespace(text="", token_ids=[0] * len(values), cumulative_logprob=0.0, finish_reason=None)
    completion.logprobs = list(values)
    prompt = {"prompt_token_ids": [1], "num_cached_tokens": None, "num_cache_creation_tokens": None}
    branch.add(Namespace(outputs=[completion], **prompt), delta=True, top_logprobs=20)
    return branch


def test_a_branchs_confidence_is_that_of_its_least_confident_group() -> None:
    branch = with_confidences(5.0, 1.0, 1.0, 4.0, 6.0)
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


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_equal_groups_have_equal_confidences_whatever_came_before(window: int) -> None:
    """As floats, the sums up to a group and their differences are rounded."""
    strategy: Any = parse_strategy({"type": "deepconf", "window": window})
    group = [0.1, 0.2, 0.7, 0.3, 0.15, 0.05, 0.6][:window]
    before = [[], [1.1], [1e6 / 3], [2.3, 9.7, 4.1] * 50]
    assert len({strategy._confidence(with_confidences(*some, *group)) for some in before}) == 1


def test_a_threshold_at_a_value_is_that_value() -> None:
    """(1 - 0.7) * 10 is 3.0000000000000004 in floating point."""
    for count, tenths in itertools.product(range(2, 40), range(1, 10)):
        values = [0.1 * i + 0.01 for i in range(count)]
        position, rest = divmod((10 - tenths) * (count - 1), 10)
        if not rest:
            assert quantile(values, 1 - tenths / 10) == values[position]
    assert quantile([], 0.5) is None
    assert quantile([3.0], 0.5) == 3.0


def test_a_warm_up_branch_at_the_threshold_votes() -> None:
    warm = [Script(box(i), confidence=1 + i / 10) for i in range(11)]
    settings = {"type": "deepconf", "n": 12, "warmup": 11, "keep": 0.7, "consensus": 1.0}
    run = ScriptedRun(settings, ScriptedEngine(*warm, Script(box(99), confidence=0.1))).play()
    assert set(run.summary["votes"]) == {str(i) for i in range(3, 11)}


def deepconf(*scripts: Script, **settings: Any) -> ScriptedRun:
    """Run two branches as the warm-up and the others after it; its summary must be JSON."""
    fields = {"type": "deepconf", "n": len(scripts), "warmup": 2, "window": 2, "consensus": 1.0} | settings
    run = ScriptedRun(fields, ScriptedEngine(*scripts)).play()
    json.dumps(run.summary, allow_nan=False)
    return run


def test_tokens_without_a_choice_are_not_counted() -> None:
    """As under a grammar, which masks all candidates of a token but one."""
    scripts = [
        Script(box(1), 4, confidence=(None, 3.0, None, 1.0)),
        Script(box(4), 3, confidence=(2.0, None, 2.0)),
        Script(box(2), 5, confidence=(None, 2.0, None, None, 2.0)),
        Script(box(3), 9, confidence=(None, 1.0, None, 1.0, *[9.0] * 5)),
    ]
    run = deepconf(*scripts, keep=0.5)
    assert run.summary["threshold"] == 2.0
    assert run.states() == ["completed"] * 3 + ["cancelled"]
    assert run.summary["votes"] == {"1": 1, "2": 1, "4": 1}


def test_a_branch_without_any_choice_has_no_vote() -> None:
    forced = [None] * 3
    warm = [Script(box(answer), confidence=c) for answer, c in ((1, forced), (2, 2.0), (3, 2.0))]
    run = deepconf(*warm, Script(box(1), confidence=forced), Script(box(2), confidence=3.0), warmup=3)
    assert (run.summary["threshold"], run.summary["votes"]) == (2.0, {"2": 2, "3": 1})


def test_without_any_voter_the_likeliest_reply_is_taken() -> None:
    forced = [None] * 3
    run = deepconf(*[Script(f"reply {i}", logprob=p, confidence=forced) for i, p in enumerate((-3.0, -1.0, -2.0))])
    assert run.text == "reply 1"
    assert run.states() == ["completed"] * 3
    assert (run.summary["threshold"], run.summary["answer"], run.summary["votes"]) == (None, None, {})
    assert run.summary["no_answer"] == 0


def test_without_a_threshold_a_branch_with_a_confidence_votes() -> None:
    forced = [None] * 3
    run = deepconf(Script(box(1), confidence=forced), Script(box(1), confidence=forced), Script(box(5), confidence=0.1))
    assert (run.summary["threshold"], run.summary["votes"], run.text) == (None, {"5": 1}, box(5))


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits"])
def test_a_server_without_log_probabilities_refuses_deepconf(mode: str) -> None:
    engine = ScriptedEngine()
    engine.logprobs_mode = mode
    with pytest.raises(ParamsError, match=f"--logprobs-mode {mode}"):
        ScriptedRun({"type": "deepconf"}, engine).play()
