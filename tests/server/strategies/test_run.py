"""What every strategy's run guarantees to the server: errors, cancellation, progress, and the branch limit."""

import asyncio
from typing import Any

import pytest

from server.admission import TooManyBranchesError
from server.strategies.run import StrategyRun
from tests.server.strategies.scripted import Script, ScriptedEngine, ScriptedRun, box


@pytest.mark.parametrize("kind", ["self_consistency", "deepconf", "refinement"])
def test_if_all_branches_fail_the_engines_error_is_raised(kind: str) -> None:
    settings = {"type": kind} | ({} if kind == "refinement" else {"n": 5})
    with pytest.raises(ZeroDivisionError):
        ScriptedRun(settings, ScriptedEngine(*[Script(fails=ZeroDivisionError("x"))] * 5)).play()
    with pytest.raises(RuntimeError, match=r"all \d branches failed"):
        ScriptedRun(settings, ScriptedEngine(*[Script(fails="error")] * 5)).play()


@pytest.mark.parametrize("kind", ["self_consistency", "deepconf", "refinement"])
def test_if_the_client_disconnects_its_branches_are_cancelled(kind: str) -> None:
    settings = {"type": kind} | ({} if kind == "refinement" else {"n": 6})
    run = ScriptedRun(settings, ScriptedEngine(*[Script(box(1), 10**9)] * 6))
    run.play(until=lambda run: run.engine.generated > 30)
    assert not run.engine.running
    assert set(run.states()) == {"cancelled"}
    assert run.metric("branches_cancelled_total") == run.metric("branches_started_total") > 0
    assert run.metric("branches_running") == run.limit.taken == 0


def test_reserved_branches_are_released_once() -> None:
    settings = {"type": "self_consistency", "n": 5}
    run = ScriptedRun(settings, ScriptedEngine(*[Script(box(1))] * 5), limit=5)
    assert run.limit.taken == 5
    with pytest.raises(TooManyBranchesError, match="5 places asked for, 0 of 5 are free"):
        StrategyRun(run.run.strategy, run.limit, run.run.metrics, run.next_prompt, dict)
    run.play()
    run.run.close()
    assert run.limit.taken == 0


def test_progress_returns_for_each_change_until_the_reply_begins() -> None:
    """The changes: two branches start together, then each of them ends."""
    scripted = ScriptedRun({"type": "self_consistency", "n": 2}, ScriptedEngine(Script(tokens=4), Script(tokens=9)))

    async def follow() -> list[tuple[int, int]]:
        reply: Any = asyncio.ensure_future(anext(scripted.run.outputs(scripted.engine)))
        seen = []
        while not reply.done():
            await scripted.run.progress(reply, timeout_s=60)
            seen.append((scripted.summary.get("running", 0), scripted.summary["completed"]))
        return seen

    seen = asyncio.run(follow())
    assert seen[0] == (2, 0)
    assert (1, 1) in seen
    assert seen[-1] == (0, 2)
    assert len(seen) <= 4


def test_places_are_free_once_the_branches_are_over_though_the_reply_is_not_read() -> None:
    run = ScriptedRun({"type": "self_consistency", "n": 5}, ScriptedEngine(*[Script(box(1))] * 5), limit=5)

    async def read_slowly() -> None:
        outputs = run.run.outputs(run.engine)
        await anext(outputs)
        assert run.limit.taken == 0
        run.limit.acquire(5)  # another request's
        async for _ in outputs:
            pass
        run.run.close()
        assert run.limit.taken == 5

    asyncio.run(read_slowly())


def test_a_client_that_leaves_before_the_first_branch_starts_gives_places_back() -> None:
    run = ScriptedRun({"type": "self_consistency", "n": 5}, ScriptedEngine(*[Script(box(1))] * 5), limit=5)
    run.run.outputs(run.engine)  # never read
    run.run.close()
    assert run.limit.taken == 0
    assert not run.run.branches.started


def test_branches_that_keep_log_probabilities_take_more_places() -> None:
    settings = {"type": "self_consistency", "n": 6, "parallel": 4}
    for logprobs, places in ((0, 4), (1, 8), (5, 8), (6, 12), (10**6, 30)):  # never more than there are
        run = ScriptedRun(settings, ScriptedEngine(*[Script(box(1))] * 6), limit=30, logprobs=logprobs)
        assert run.limit.taken == places
        assert run.play().limit.taken == 0
    with pytest.raises(TooManyBranchesError, match="4 places asked for, 3 of 3 are free"):
        ScriptedRun(settings, ScriptedEngine(), limit=3, logprobs=5)


def test_usage_adds_up_the_details_that_vllm_reports() -> None:
    run = ScriptedRun(
        {"type": "self_consistency", "n": 3},
        ScriptedEngine(*[Script(box(1), tokens) for tokens in (3, 4, 5)]),
        count_reasoning=lambda prompt, reply: len(reply) - len(prompt),
    )
    usage = run.play().run.usage
    assert usage({"prompt_tokens_details": None})["prompt_tokens_details"] is None
    assert "completion_tokens_details" not in usage({})
    prompt: dict[str, Any] = {"cached_tokens": 1, "created_cache_tokens": 4, "audio_tokens": None}
    prompt["multimodal_tokens"] = {"image": 2}
    reported = usage({"prompt_tokens_details": prompt, "completion_tokens_details": {"reasoning_tokens": 1}})
    summed = {"cached_tokens": 3, "created_cache_tokens": 12, "audio_tokens": None, "multimodal_tokens": {"image": 6}}
    assert reported["prompt_tokens_details"] == summed
    assert reported["completion_tokens_details"] == {"reasoning_tokens": 1 + 2 + 3}
    some = usage({"prompt_tokens_details": {"cached_tokens": 0, "created_cache_tokens": None}})
    assert some["prompt_tokens_details"] == {"cached_tokens": 3, "created_cache_tokens": None}


def test_reasoning_of_cancelled_branches_counts_too() -> None:
    run = ScriptedRun(
        {"type": "self_consistency", "n": 3, "early_stop": True},
        ScriptedEngine(Script(box(1)), Script(box(1)), Script(box(2), 500)),
        count_reasoning=lambda prompt, reply: len(reply),
    ).play()
    usage = run.run.usage({"completion_tokens_details": {"reasoning_tokens": 3}})
    assert run.summary["cancelled"] == 1
    assert usage["completion_tokens_details"]["reasoning_tokens"] == usage["completion_tokens"] > 6


def test_an_error_does_not_call_branches_failed_that_did_not_fail() -> None:
    run = ScriptedRun({"type": "self_consistency", "n": 2}, ScriptedEngine(Script(fails="error"), Script())).play().run
    run.branches.started[1].state = "cancelled"
    assert str(run.branches.failure()) == "no branch completed"
