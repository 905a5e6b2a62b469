"""Strategies over an engine made of scripts, which fails and is slow where a real one cannot be told to."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from em_sampler.validation import ParamsError
from server.admission import BranchLimit, TooManyBranchesError
from server.stats.collector import RequestStats
from server.strategies.metrics import StrategyMetrics
from server.strategies.branches import Branch
from server.strategies.registry import STRATEGIES, parse_strategy
from server.strategies.run import StrategyRun


@dataclasses.dataclass
class Script:
    """One branch: so many tokens, after each of which the others have their turn, then this reply."""

    text: str = ""
    tokens: int = 3
    fails: Exception | str | None = None  # raised, or a finish reason, at its end
    logprob: float = -1.0  # of each token
    confidence: float = 1.0  # of each token


class ScriptedEngine:
    """An origin whose branches follow scripts, and that knows what it has generated."""

    max_logprobs = 20

    def __init__(self, *scripts: Script, temperature: float = 1.0) -> None:
        self.scripts = scripts
        self.sampling_params = Namespace(temperature=temperature, logprob_token_ids=None)
        self.aborted: set[str] = set()
        self.generated = 0
        self.in_engine: set[str] = set()
        self.most = 0  # at a time
        self.prompts: list[Any] = []

    def branch(
        self, number: int, prompt: Any, logprobs: int, every_token: bool
    ) -> tuple[str, bool, AsyncIterator[Any], list[RequestStats]]:
        self.prompts.append(prompt)
        return str(number), True, self._outputs(str(number), self.scripts[number]), []

    async def abort(self, request_id: str) -> None:
        self.aborted.add(request_id)

    def failure(self, message: str) -> Exception:
        return RuntimeError(message)

    def as_own_outputs(self, outputs: list[Any]) -> list[Any]:
        return outputs

    async def _outputs(self, request_id: str, script: Script) -> AsyncIterator[Any]:
        self.in_engine.add(request_id)
        self.most = max(self.most, len(self.in_engine))
        try:
            for position in range(script.tokens):
                await asyncio.sleep(0)
                if request_id in self.aborted:
                    yield self._output([], "", position * script.logprob, "abort", script)
                    return
                self.generated += 1
                last = position + 1 == script.tokens
                if last and isinstance(script.fails, Exception):
                    raise script.fails
                reason = (script.fails or "stop") if last else None
                yield self._output([7], script.text if last else "", (position + 1) * script.logprob, reason, script)
        finally:
            self.in_engine.discard(request_id)

    def _output(self, tokens: list[int], text: str, logprob: float, reason: Any, script: Script) -> Any:
        row = {0: Namespace(logprob=-script.confidence, rank=1), 1: Namespace(logprob=-99.0, rank=30)}
        completion = Namespace(text=text, token_ids=tokens, cumulative_logprob=logprob, finish_reason=reason)
        completion.logprobs = [row for _ in tokens]
        finished = reason is not None
        return Namespace(outputs=[completion], finished=finished, prompt_token_ids=[1, 2], num_cached_tokens=1)


class Played:
    """A strategy that has run."""

    def __init__(self, settings: dict[str, Any], engine: ScriptedEngine, limit: int = 100) -> None:
        self.engine = engine
        self.registry = CollectorRegistry()
        self.limit = BranchLimit(limit)
        strategy = parse_strategy(settings)
        assert strategy
        metrics = StrategyMetrics("m", list(STRATEGIES), self.registry)
        self.run = StrategyRun(strategy, self.limit, metrics, self._render, dict)
        self.outputs: list[Any] = []

    async def _render(self, reply: str) -> Any | None:
        return None if reply == "too long" else f"after {reply}"

    def play(self, until: Callable[["Played"], bool] | None = None) -> "Played":
        """All of it, or until the client goes away."""
        asyncio.run(self._play(until))
        return self

    async def _play(self, until: Callable[["Played"], bool] | None) -> None:
        async def consume() -> None:
            self.outputs.extend([output async for output in self.run.outputs(self.engine)])

        consumer = asyncio.ensure_future(consume())
        while until and not until(self):
            await asyncio.sleep(0)
        if until:
            consumer.cancel()
        try:
            await consumer
        except asyncio.CancelledError:
            assert until
        finally:
            self.run.close()

    @property
    def block(self) -> dict[str, Any]:
        return self.run.summary()

    @property
    def text(self) -> str:
        return "".join(output.outputs[0].text for output in self.outputs)

    def metric(self, name: str) -> float:
        labels = {"model": "m", "strategy": self.run.strategy.type}
        value = self.registry.get_sample_value(f"em_inf_strategy_{name}", labels)
        assert value is not None
        return value

    def states(self) -> list[str]:
        return [branch.state for branch in self.run.branches.started]


def box(answer: object) -> str:
    return rf"so \boxed{{{answer}}}"


def vote(*scripts: Script, **settings: Any) -> Played:
    settings = {"type": "self_consistency", "n": len(scripts)} | settings
    return Played(settings, ScriptedEngine(*scripts)).play()


# ---- Self-consistency


def test_the_first_branch_with_the_winning_answer_is_the_reply() -> None:
    texts = [box(3), "first " + box(5), box("5.0"), "nothing"]
    played = vote(*(Script(text, tokens=9 - i) for i, text in enumerate(texts)))
    assert played.text == texts[1]
    assert played.block == {
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
    assert played.run.usage({"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10}) == {
        "prompt_tokens": 8,
        "completion_tokens": 30,
        "total_tokens": 38,
    }
    assert played.metric("agreement_sum") == pytest.approx(2 / 3, abs=1e-6)


def test_a_tie_goes_to_the_likelier_answer_per_token() -> None:
    scripts = [Script(box(1), logprob=-0.5), Script(box(2), logprob=-0.2, tokens=30)]
    assert vote(*scripts).block["answer"] == "2"
    assert vote(*reversed(scripts)).block["answer"] == "2"


def test_without_any_answer_the_likeliest_reply_is_taken() -> None:
    played = vote(Script("a", logprob=-2), Script("b", logprob=-1), Script("c", logprob=-3))
    assert (played.text, played.block["answer"], played.block["votes"], played.block["no_answer"]) == ("b", None, {}, 3)


def test_early_stop_ends_what_cannot_change_the_outcome_and_counts_its_tokens() -> None:
    scripts = [Script(box(4), 3), Script(box(4), 5), Script(box(4), 5), Script(box(6), 500), Script(box(4), 500)]
    whole = vote(*scripts)
    played = vote(*scripts, early_stop=True)
    assert played.block["answer"] == whole.block["answer"] == "4"
    assert played.text == whole.text
    assert played.states() == ["completed"] * 3 + ["cancelled"] * 2
    assert played.engine.aborted == {"3", "4"}
    assert sum(played.block["completion_tokens"]) == played.engine.generated < 30
    assert whole.engine.generated == 1013
    assert played.metric("branches_cancelled_total") == 2
    assert played.metric("tokens_saved_total") == 0  # those that were completed are shorter than the cancelled were
    assert played.metric("branches_running") == 0


def test_tokens_saved_are_told_by_the_mean_length_of_the_completed() -> None:
    scripts = [Script(box(4), 50), Script(box(4), 50), Script(box(5), 1000)]
    played = vote(*scripts, early_stop=True)
    ended = played.block["completion_tokens"][2]
    assert played.metric("tokens_saved_total") == max(0, 50 - ended)


def test_so_many_at_a_time_and_none_after_the_vote_is_settled() -> None:
    scripts = [Script(box(4), 50)] * 3 + [Script(box(5), 50)] + [Script(box(4), 70)] * 6
    played = vote(*scripts, parallel=3, early_stop=True)
    assert played.engine.most == 3
    # Six votes of ten decide it: the seventh sample ends the two running, and the tenth is never started.
    assert played.block["votes"] == {"4": 6, "5": 1}
    assert played.states() == ["completed"] * 7 + ["cancelled"] * 2
    assert played.run.branches.never_started == 1
    mean = 410 / 7
    cancelled = sum(mean - tokens for tokens in played.block["completion_tokens"][7:])
    assert played.metric("tokens_saved_total") == pytest.approx(cancelled + mean)
    whole = vote(*scripts, parallel=3)
    assert (whole.engine.most, whole.block["completed"], whole.metric("tokens_saved_total")) == (3, 10, 0)
    assert whole.block["answer"] == played.block["answer"]
    assert vote(*scripts, parallel=99).engine.most == 10


def test_only_those_at_a_time_take_places() -> None:
    played = Played({"type": "self_consistency", "n": 9, "parallel": 2}, ScriptedEngine(*[Script(box(1))] * 9), limit=2)
    assert played.limit.taken == 2
    assert played.play().block["completed"] == 9
    assert played.limit.taken == 0


def test_early_stop_waits_while_a_tie_is_possible() -> None:
    scripts = [Script(box(1), 2, logprob=-9), Script(box(1), 3, logprob=-9), Script(box(2), 40), Script(box(2), 50)]
    played = vote(*scripts, early_stop=True)
    assert played.block["answer"] == "2"  # by its likelihood: an end at two votes of four would have missed it
    assert played.block["cancelled"] == 0


def test_confidence_stops_earlier() -> None:
    scripts = [Script(box(1), 3 * i) for i in range(1, 5)] + [Script(box(2), 900) for _ in range(12)]
    assert vote(*scripts, early_stop=True).block["completed"] == 16
    # After 4 of 4 votes the posterior is 1 - 2 ** -5.
    assert vote(*scripts, early_stop=True, confidence=0.96).block["completed"] == 4
    assert vote(*scripts, early_stop=True, confidence=0.97).block["completed"] == 16


def test_a_branch_that_fails_leaves_the_vote_to_the_others() -> None:
    scripts = [Script(box(1), fails=RuntimeError("broken")), Script(box(1), fails="abort"), Script(box(2), 9)]
    played = vote(*scripts, early_stop=True)
    assert (played.block["answer"], played.block["failed"], played.text) == ("2", 2, box(2))
    assert played.metric("branches_failed_total") == 2


@pytest.mark.parametrize("kind", ["self_consistency", "deepconf", "refinement"])
def test_all_failing_fails_with_the_engines_own_error(kind: str) -> None:
    settings = {"type": kind} | ({} if kind == "refinement" else {"n": 5})
    with pytest.raises(ZeroDivisionError):
        Played(settings, ScriptedEngine(*[Script(fails=ZeroDivisionError("x"))] * 5)).play()
    with pytest.raises(RuntimeError, match=r"all \d branches failed"):
        Played(settings, ScriptedEngine(*[Script(fails="error")] * 5)).play()


@pytest.mark.parametrize("kind", ["self_consistency", "deepconf", "refinement"])
def test_a_client_that_goes_away_takes_its_branches_along(kind: str) -> None:
    settings = {"type": kind} | ({} if kind == "refinement" else {"n": 6})
    played = Played(settings, ScriptedEngine(*[Script(box(1), 10**9)] * 6))
    played.play(until=lambda played: played.engine.generated > 30)
    assert not played.engine.in_engine
    assert set(played.states()) == {"cancelled"}
    assert played.metric("branches_cancelled_total") == played.metric("branches_started_total") > 0
    assert played.metric("branches_running") == played.limit.taken == 0


# ---- Refinement


def refine(*scripts: Script, **settings: Any) -> Played:
    return Played({"type": "refinement"} | settings, ScriptedEngine(*scripts)).play()


def test_each_round_follows_from_the_reply_before_it() -> None:
    played = refine(*(Script(box(i)) for i in range(4)), rounds=4)
    assert played.engine.prompts == [None, *(f"after {box(i)}" for i in range(3))]
    assert played.text == box(3)
    assert played.block["answers"] == ["0", "1", "2", "3"]
    assert played.block["rounds"] == played.block["completed"] == 4
    assert played.run.usage({})["total_tokens"] == 4 * (2 + 3)


def test_it_stops_when_two_rounds_agree() -> None:
    played = refine(
        Script(box(1)), Script("none"), Script("none"), Script(box("2.0")), Script(box(2)), Script(box(9)), rounds=6
    )
    assert played.block["answers"] == ["1", None, None, "2", "2"]
    assert played.block["answer"] == "2"
    assert played.block["no_answer"] == 2
    assert played.metric("tokens_saved_total") == 3  # of the round that was not needed


def test_a_round_that_fails_or_does_not_fit_leaves_the_reply_before_it() -> None:
    failed = refine(Script(box(1)), Script(box(2), fails=ValueError("x")), Script(box(3)))
    assert (failed.text, failed.states()) == (box(1), ["completed", "failed"])
    full = refine(Script("too long"), Script(box(2)))
    assert (full.text, full.block["stopped_by"]) == ("too long", "context")


def test_a_round_that_is_cut_off_leaves_the_whole_reply_before_it() -> None:
    cut = refine(Script(box(1)), Script("so", fails="length"), Script(box(3)))
    assert (cut.text, cut.block["stopped_by"], cut.block["answers"]) == (box(1), "length", ["1"])
    # One that was cut off itself is no better than the next.
    short = refine(Script("so", fails="length"), Script("and", fails="length"), Script(box(3)))
    assert (short.text, short.block["answers"]) == (box(3), [None, None, "3"])


# ---- DeepConf


def test_branches_below_the_warm_ups_threshold_are_ended_on_the_way() -> None:
    """Four in the warm-up, of which the quantile 0.25 is between the second and the lowest."""
    warm = [Script(box(answer), 8, confidence=c) for answer, c in ((1, 4.0), (5, 3.0), (1, 2.0), (1, 1.0))]
    later = [Script(box(2), 9, confidence=0.5), Script(box(3), 9, confidence=5.0), Script(box(4), 3, confidence=0.5)]
    played = Played(
        {"type": "deepconf", "n": 7, "warmup": 4, "window": 4, "keep": 0.75, "consensus": 1.0},
        ScriptedEngine(*warm, *later),
    ).play()
    assert played.block["threshold"] == 1.75
    assert played.states() == ["completed"] * 4 + ["cancelled", "completed", "completed"]
    assert played.block["completion_tokens"][4] in (4, 5)  # at its first full window
    # Those of the warm-up below the threshold have no vote, nor one too short for a window.
    assert played.block["votes"] == {"1": 2, "3": 1, "5": 1}
    assert played.block["agreement"] == pytest.approx(6 / 14, abs=1e-6)


def test_the_least_confident_group_counts() -> None:
    sums = [0.0]
    for value in (5.0, 1.0, 1.0, 4.0, 6.0):
        sums.append(sums[-1] + value)
    branch = Branch(0)
    branch.confidence_sums = sums
    for window, least in ((1, 1.0), (2, 1.0), (3, 2.0), (5, 3.4), (9, 3.4)):
        strategy: Any = parse_strategy({"type": "deepconf", "window": window})
        assert strategy._confidence(branch) == pytest.approx(least)


def test_agreement_in_the_warm_up_makes_the_rest_unnecessary() -> None:
    played = Played({"type": "deepconf", "n": 8, "warmup": 3}, ScriptedEngine(*[Script(box(1))] * 8)).play()
    assert len(played.run.branches.started) == 3
    assert played.metric("tokens_saved_total") == 5 * 3


def test_agreement_later_ends_the_rest() -> None:
    scripts = [Script(box(1)), Script(box(2)), *[Script(box(1), 4)] * 4, *[Script(box(1), 500)] * 2]
    played = Played({"type": "deepconf", "n": 8, "warmup": 2, "consensus": 0.8}, ScriptedEngine(*scripts)).play()
    assert played.states() == ["completed"] * 6 + ["cancelled"] * 2


# ---- What every request must keep to


def test_equal_branches_are_refused() -> None:
    for kind in ("self_consistency", "deepconf"):
        with pytest.raises(ParamsError) as caught:
            Played({"type": kind}, ScriptedEngine(temperature=0.0)).play()
        assert caught.value.field == "body.temperature"


def test_places_are_given_back_once() -> None:
    settings = {"type": "self_consistency", "n": 5}
    played = Played(settings, ScriptedEngine(*[Script(box(1))] * 5), limit=5)
    assert played.limit.taken == 5
    with pytest.raises(TooManyBranchesError, match="5 branches asked for, 0 of 5 places are free"):
        StrategyRun(played.run.strategy, played.limit, played.run.metrics, played._render, dict)
    played.play()
    played.run.close()
    assert played.limit.taken == 0
