"""Branches: which ones count as failed, a token's confidence, and the tokens that cancelling saved."""

import math
from types import SimpleNamespace as Namespace

import pytest

from server.strategies.branches import CONFIDENCE_UNITS, Branch, confidence, token_confidence
from tests.server.strategies.scripted import Script, box, vote


def test_a_branch_that_fails_leaves_the_vote_to_the_others() -> None:
    scripts = [Script(box(1), fails=RuntimeError("broken")), Script(box(1), fails="abort"), Script(box(2), 9)]
    run = vote(*scripts, early_stop=True)
    assert (run.summary["answer"], run.summary["failed"], run.text) == ("2", 2, box(2))
    assert run.metric("branches_failed_total") == 2


def test_tokens_saved_are_estimated_by_the_mean_length_of_completed_branches() -> None:
    scripts = [Script(box(4), 50), Script(box(4), 50), Script(box(5), 1000)]
    run = vote(*scripts, early_stop=True)
    cancelled_at = run.summary["completion_tokens"][2]
    assert run.metric("tokens_saved_total") == max(0, 50 - cancelled_at)


def test_confidence_is_the_mean_of_the_top_candidates_alone() -> None:
    """The sampled token is among the candidates even if its rank is lower than the top."""
    logprobs = {5: (-0.5, 1), 8: (-1.5, 2), 2: (-4.0, 3), 9: (-9.0, 700)}
    candidates = {token: Namespace(logprob=logprob, rank=rank) for token, (logprob, rank) in logprobs.items()}
    assert token_confidence(candidates, top=2) == pytest.approx(1.0)
    assert token_confidence(candidates, top=3) == pytest.approx(2.0)


@pytest.mark.parametrize("masked", [-math.inf, math.nan])
def test_masked_candidates_do_not_count_and_a_token_without_a_choice_has_no_confidence(masked: float) -> None:
    assert confidence([-1.0, -3.0, masked]) == pytest.approx(2.0)
    assert confidence([-0.0, masked, masked]) is None
    assert confidence([masked]) is confidence([]) is None


def test_a_branch_counts_only_tokens_that_had_a_choice() -> None:
    branch = Branch(0)
    step = output("a", [1, 2, 3], -1.0, None)
    step.outputs[0].logprobs = [2.0, None, 0.5]  # vLLM's processor of such a branch returns confidences
    branch.add(step, delta=True, top_logprobs=5)
    assert [total / CONFIDENCE_UNITS for total in branch.confidence_sums] == [0, 2.0, 2.5]


@pytest.mark.parametrize("logprob", [math.nan, math.inf, -math.inf])
def test_a_log_probability_that_is_no_number_is_the_least(logprob: float) -> None:
    branch = Branch(0)
    branch.add(output("a", [1], logprob, "stop"), delta=True, top_logprobs=0)
    assert branch.mean_logprob == -math.inf


def test_a_branch_that_has_lost_gives_back_its_outputs_and_keeps_its_counts() -> None:
    """One branch for each answer is kept: later votes may make any of them the reply."""
    scripts = [Script(box(1)), Script(box(1), fails="abort"), Script(box(2), 4), *[Script(box(1), 5)] * 2]
    run = vote(*scripts, Script(box(2), 500), early_stop=True)
    assert run.states() == ["completed", "failed", "completed", "completed", "completed", "cancelled"]
    assert {branch.number: len(branch.outputs) for branch in run.run.branches.started if branch.outputs} == {0: 3, 2: 4}
    assert run.text == box(1)
    assert run.summary["completion_tokens"][:5] == [3, 3, 4, 5, 5]


def output(text: str, tokens: list[int], logprob: float, reason: str | None) -> Namespace:
    completion = Namespace(text=text, token_ids=tokens, cumulative_logprob=logprob, finish_reason=reason, logprobs=None)
    prompt = {"prompt_token_ids": [1, 2, 3], "num_cached_tokens": 2, "num_cache_creation_tokens": None}
    return Namespace(outputs=[completion], **prompt)


@pytest.mark.parametrize("delta", [True, False])
def test_a_branch_adds_up_deltas_and_replaces_cumulative_outputs(delta: bool) -> None:
    branch = Branch(0)
    assert branch.mean_logprob == -math.inf
    branch.add(output("", [], 0.0, None), delta, top_logprobs=0)
    assert branch.prompt_tokens == 0  # not prefilled yet
    branch.add(output("a", [4], -1.0, None), delta, top_logprobs=0)
    branch.add(output("b" if delta else "ab", [6] if delta else [4, 6], -3.0, "length"), delta, top_logprobs=0)
    assert (branch.text, branch.tokens, branch.prompt_tokens, branch.cached_tokens) == ("ab", 2, 3, 2)
    assert (branch.mean_logprob, branch.cut_off) == (-1.5, True)
