"""A strategy at work on one request, as the server sees it: the reply's outputs, the usage, the summary.

What the strategy itself sees is `branches.Branches`. Knows no HTTP and none of vLLM's classes.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

from server.admission import BranchLimit
from server.strategies.base import Strategy
from server.strategies.branches import Branch, Branches, CountReasoning, EngineRequest, NextPrompt
from server.strategies.metrics import StrategyMetrics

DETAILS = ("prompt_tokens_details", "completion_tokens_details")  # of a response's usage


class StrategyRun:
    """A strategy at work on one HTTP request."""

    def __init__(
        self,
        strategy: Strategy,
        limit: BranchLimit,
        metrics: StrategyMetrics,
        next_prompt: NextPrompt,
        chunk_header: Callable[[], dict[str, Any]],
        logprobs: int = 0,
        count_reasoning: CountReasoning | None = None,
    ) -> None:
        """Reserve places for the branches of the request, until they are over or `close` is called.

        Args:
            strategy: what the request asked for.
            limit: on the branches in flight in this process.
            metrics: count branches and results.
            next_prompt: makes refinement's prompts.
            chunk_header: makes the fields that all chunks of a stream share.
            logprobs: log-probabilities per token that the client asked for.
            count_reasoning: see `Branches`.

        Raises:
            TooManyBranchesError: if fewer places are free than the branches that run at the same time take.
        """
        self.places = limit.places(strategy.max_parallel, logprobs)
        limit.acquire(self.places)
        self.strategy = strategy
        self.limit = limit
        self.metrics = metrics
        self.chunk_header = chunk_header
        self.branches = Branches(
            strategy.type, metrics, next_prompt, strategy.top_logprobs, strategy.keep_going, count_reasoning
        )
        self.winner: Branch | None = None
        self._closed = False

    def outputs(self, engine_request: EngineRequest) -> AsyncIterator[Any]:
        """Return the outputs that stand for the request's own: the winner's, once the strategy has run.

        Raises:
            ParamsError: if the strategy cannot work with the request; raised here, before the first output.
        """
        self.strategy.check(engine_request)
        self.branches.engine_request = engine_request
        return self._outputs()

    def summary(self) -> dict[str, Any]:
        """Return the response's `strategy` object as it stands. Contract: docs/http.md."""
        branches = self.branches.started
        states = Counter(branch.state for branch in branches)
        counts = {state: states[state] for state in ("completed", "cancelled", "failed")}
        running = {"running": states["running"]} if states["running"] else {}
        tokens = {"completion_tokens": [branch.tokens for branch in branches]}
        return self.strategy.summary_fields() | counts | running | self.branches.summary | tokens

    async def progress(self, reply: asyncio.Future[Any], timeout_s: float) -> None:
        """Wait at most `timeout_s` for a branch to start or end since the last call, or for the `reply` to begin."""
        change = asyncio.ensure_future(self.branches.changed.wait())
        await asyncio.wait({reply, change}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        change.cancel()
        self.branches.changed.clear()

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return `usage` with the tokens of all branches; vLLM counts the winner's alone."""
        branches = self.branches.started
        prompt = sum(branch.prompt_tokens for branch in branches)
        completion = sum(branch.tokens for branch in branches)
        total = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return usage | total | {name: self._details(usage[name]) for name in DETAILS if usage.get(name)}

    def _details(self, details: dict[str, Any]) -> dict[str, Any]:
        """Return `details` with the counts of all branches, for those that vLLM reports."""
        branches = self.branches.started
        counts: dict[str, Any] = {
            "cached_tokens": sum(branch.cached_tokens for branch in branches),
            "created_cache_tokens": sum(branch.created_cache_tokens for branch in branches),
            "reasoning_tokens": sum(branch.reasoning_tokens for branch in branches),
        }
        if modalities := details.get("multimodal_tokens"):  # the same images, for instance, in every prompt
            prefilled = sum(branch.prompt_tokens > 0 for branch in branches)
            counts["multimodal_tokens"] = {name: prefilled * tokens for name, tokens in modalities.items()}
        return details | {name: count for name, count in counts.items() if details.get(name) is not None}

    def close(self) -> None:
        """Release the reserved places. Safe to call again."""
        if not self._closed:
            self._closed = True
            self.limit.release(self.places)

    async def _outputs(self) -> AsyncIterator[Any]:
        try:
            self.winner = await self.strategy.run(self.branches)
            saved = self.branches.estimated_tokens_saved()
            self.metrics.observe_result(self.strategy.type, self.branches.summary.get("agreement"), saved)
        finally:
            try:
                await self.branches.drop_running()
            finally:
                self.close()  # here, since a client may take its time to read the reply
        for output in self.winner.outputs:
            yield output
