"""Strategies over an engine that follows scripts: it fails and is slow on demand, which a real engine is not."""

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace as Namespace
from typing import Any

from prometheus_client import CollectorRegistry

from server.admission import BranchLimit
from server.stats.collector import RequestStats
from server.strategies.branches import NoNextPromptError
from server.strategies.metrics import StrategyMetrics
from server.strategies.registry import STRATEGIES, parse_strategy
from server.strategies.run import StrategyRun


@dataclasses.dataclass
class Script:
    """What one branch generates: a token at each turn of the event loop, and the text with the last of them."""

    text: str = ""
    tokens: int = 3
    fails: Exception | str | None = None  # at its last token: raised, or the finish reason
    logprob: float = -1.0  # of each token
    confidence: float | Sequence[float | None] = 1.0  # of each token; None: it has no choice


class ScriptedEngine:
    """An `EngineRequest` whose branches follow scripts, and that counts what they generate."""

    max_logprobs = 20
    logprobs_mode = "raw_logprobs"

    def __init__(self, *scripts: Script, **sampling: float) -> None:
        self.scripts = scripts
        samples = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | sampling
        self.sampling_params = Namespace(logprob_token_ids=None, **samples)
        self.aborted: set[str] = set()
        self.generated = 0  # tokens
        self.running: set[str] = set()
        self.max_running = 0
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

    def collect(self, outputs: list[Any], output: Any) -> None:
        outputs.append(output)

    async def _outputs(self, request_id: str, script: Script) -> AsyncIterator[Any]:
        self.running.add(request_id)
        self.max_running = max(self.max_running, len(self.running))
        try:
            for position in range(script.tokens):
                await asyncio.sleep(0)
                if request_id in self.aborted:
                    yield self._output(position, [], "", "abort", script)
                    return
                self.generated += 1
                last = position + 1 == script.tokens
                if last and isinstance(script.fails, Exception):
                    raise script.fails
                reason = (script.fails or "stop") if last else None
                yield self._output(position, [7], script.text if last else "", reason, script)
        finally:
            self.running.discard(request_id)

    def _output(self, position: int, tokens: list[int], text: str, reason: Any, script: Script) -> Any:
        logprob = (position + len(tokens)) * script.logprob
        completion = Namespace(text=text, token_ids=tokens, cumulative_logprob=logprob, finish_reason=reason)
        completion.logprobs = [self._candidates(script.confidence, position) for _ in tokens]
        finished = reason is not None
        prompt = Namespace(prompt_token_ids=[1, 2], num_cached_tokens=1, num_cache_creation_tokens=4)
        return Namespace(outputs=[completion], finished=finished, **vars(prompt))

    def _candidates(self, confidence: float | Sequence[float | None], position: int) -> dict[int, Any]:
        """Return two candidates of the top with this mean, one of them masked if it is None, and one below the top."""
        own = confidence[position] if isinstance(confidence, Sequence) else confidence
        top = (0.0, -math.inf) if own is None else (-own, -own)
        ranks = zip((*top, -99.0), (1, 2, 30), strict=True)
        return {token: Namespace(logprob=logprob, rank=rank) for token, (logprob, rank) in enumerate(ranks)}


class ScriptedRun:
    """A strategy over a scripted engine, and what the server sees of it."""

    def __init__(self, settings: dict[str, Any], engine: ScriptedEngine, limit: int = 100, **options: Any) -> None:
        self.engine = engine
        self.registry = CollectorRegistry()
        self.limit = BranchLimit(limit)
        strategy = parse_strategy(settings)
        assert strategy
        metrics = StrategyMetrics("m", list(STRATEGIES), self.registry)
        self.run = StrategyRun(strategy, self.limit, metrics, self.next_prompt, dict, **options)
        self.outputs: list[Any] = []

    async def next_prompt(self, reply: str) -> str:
        if reply in ("context", "template"):
            raise NoNextPromptError(reply)  # type: ignore[arg-type]  # one of the two
        return f"after {reply}"

    def play(self, until: Callable[["ScriptedRun"], bool] | None = None) -> "ScriptedRun":
        """Run the strategy to its end, or disconnect the client once `until` holds."""
        asyncio.run(self._play(until))
        return self

    async def _play(self, until: Callable[["ScriptedRun"], bool] | None) -> None:
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
    def summary(self) -> dict[str, Any]:
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


def vote(*scripts: Script, **settings: Any) -> ScriptedRun:
    """Run self-consistency over a branch for each script."""
    settings = {"type": "self_consistency", "n": len(scripts)} | settings
    return ScriptedRun(settings, ScriptedEngine(*scripts)).play()
