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
    with pytest.raises(TooManyBranchesError, match="5 branches asked for, 0 of 5 places are free"):
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


def test_usage_adds_cached_tokens_only_if_vllm_reports_them() -> None:
    run = ScriptedRun({"type": "self_consistency", "n": 3}, ScriptedEngine(*[Script(box(1))] * 3)).play().run
    assert run.usage({"prompt_tokens_details": None})["prompt_tokens_details"] is None
    reported = {"prompt_tokens_details": {"cached_tokens": 1, "audio_tokens": None}}
    assert run.usage(reported)["prompt_tokens_details"] == {"cached_tokens": 3, "audio_tokens": None}
