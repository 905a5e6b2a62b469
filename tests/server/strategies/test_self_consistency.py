"""Self-consistency: the vote, when it stops early, and how many samples run at the same time."""

import pytest

from tests.server.strategies.scripted import Script, ScriptedEngine, ScriptedRun, box, vote


def test_the_first_branch_with_the_winning_answer_is_the_reply() -> None:
    texts = [box(3), "first " + box(5), box("5.0"), "nothing"]
    run = vote(*(Script(text, tokens=9 - i) for i, text in enumerate(texts)))
    assert run.text == texts[1]
    assert run.summary == {
        "type": "self_consistency",
        "n": 4,
        "completed": 4,
        "cancelled": 0,
        "failed": 0,
        "answer": "5",
        "votes": {"5": 2, "3": 1},
        "no_answer": 1,
        "agreement": 0.666667,
        "completion_tokens": [9, 8, 7, 6],
    }
    assert run.run.usage({"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10}) == {
        "prompt_tokens": 8,
        "completion_tokens": 30,
        "total_tokens": 38,
    }
    assert run.metric("agreement_sum") == pytest.approx(2 / 3, abs=1e-6)


def test_early_stop_cancels_what_cannot_change_the_outcome_and_counts_its_tokens() -> None:
    scripts = [Script(box(4), 3), Script(box(4), 5), Script(box(4), 5), Script(box(6), 500), Script(box(4), 500)]
    complete = vote(*scripts)
    stopped = vote(*scripts, early_stop=True)
    assert stopped.summary["answer"] == complete.summary["answer"] == "4"
    assert stopped.text == complete.text
    assert stopped.states() == ["completed"] * 3 + ["cancelled"] * 2
    assert stopped.engine.aborted == {"3", "4"}
    assert sum(stopped.summary["completion_tokens"]) == stopped.engine.generated < 60
    assert complete.engine.generated == 1013
    assert stopped.metric("branches_cancelled_total") == 2
    assert stopped.metric("tokens_saved_total") == 0  # the completed ones are shorter than the cancelled ones were
    assert stopped.metric("branches_running") == 0


def test_at_most_parallel_samples_run_and_none_starts_once_the_vote_is_decided() -> None:
    scripts = [Script(box(4), 50)] * 3 + [Script(box(5), 50)] + [Script(box(4), 70)] * 6
    stopped = vote(*scripts, parallel=3, early_stop=True)
    assert stopped.engine.max_running == 3
    # Six votes of ten decide it: after the seventh sample, the two running are cancelled and the tenth never starts.
    assert stopped.summary["votes"] == {"4": 6, "5": 1}
    assert stopped.states() == ["completed"] * 7 + ["cancelled"] * 2
    assert stopped.run.branches.never_started == 1
    mean = 410 / 7
    cancelled = sum(mean - tokens for tokens in stopped.summary["completion_tokens"][7:])
    assert stopped.metric("tokens_saved_total") == pytest.approx(cancelled + mean)
    complete = vote(*scripts, parallel=3)
    assert complete.engine.max_running == 3
    assert (complete.summary["completed"], complete.metric("tokens_saved_total")) == (10, 0)
    assert complete.summary["answer"] == stopped.summary["answer"]
    assert vote(*scripts, parallel=99).engine.max_running == 10


def test_a_request_reserves_only_the_branches_that_run_at_the_same_time() -> None:
    settings = {"type": "self_consistency", "n": 9, "parallel": 2}
    run = ScriptedRun(settings, ScriptedEngine(*[Script(box(1))] * 9), limit=2)
    assert run.limit.taken == 2
    assert run.play().summary["completed"] == 9
    assert run.limit.taken == 0


def test_early_stop_waits_while_a_tie_is_possible() -> None:
    scripts = [Script(box(1), 2, logprob=-9), Script(box(1), 3, logprob=-9), Script(box(2), 40), Script(box(2), 50)]
    run = vote(*scripts, early_stop=True)
    assert run.summary["answer"] == "2"  # by its log-probability: stopping after two votes of four would miss it
    assert run.summary["cancelled"] == 0


def test_confidence_stops_earlier() -> None:
    scripts = [Script(box(1), 3 * i) for i in range(1, 5)] + [Script(box(2), 900) for _ in range(12)]
    assert vote(*scripts, early_stop=True).summary["completed"] == 16
    # After 4 of 4 votes the leader's probability is 1 - 2 ** -5.
    assert vote(*scripts, early_stop=True, confidence=0.96).summary["completed"] == 4
    assert vote(*scripts, early_stop=True, confidence=0.97).summary["completed"] == 16
