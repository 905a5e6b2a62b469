"""A strategy at work on one request, as the server sees it: the reply's outputs, the usage, the summary.

What the strategy itself sees is `branches.Branches`. Knows no HTTP and none of vLLM's classes.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

from server.admission import BranchLimit
from server.strategies.base import Strategy
from server.strategies.branches import Branch, Branches, EngineRequest, NextPrompt
from server.strategies.metrics import StrategyMetrics


class StrategyRun:
    """A strategy at work on one HTTP request."""

    def __init__(
        self,
        strategy: Strategy,
        limit: BranchLimit,
        metrics: StrategyMetrics,
        next_prompt: NextPrompt,
        chunk_header: Callable[[], dict[str, Any]],
    ) -> None:
        """Reserve the branches of the request, until `close`.

        Args:
            strategy: what the request asked for.
            limit: on the branches in flight in this process.
            metrics: count branches and results.
            next_prompt: makes refinement's prompts.
            chunk_header: makes the fields that all chunks of a stream share.

        Raises:
            TooManyBranchesError: if fewer branches are free than the strategy runs at the same time.
        """
        limit.acquire(strategy.max_parallel)
        self.strategy = strategy
        self.limit = limit
        self.metrics = metrics
        self.chunk_header = chunk_header
        self.branches = Branches(strategy.type, metrics, next_prompt, strategy.top_logprobs, strategy.keep_going)
        self.winner: Branch | None = None
        self._closed = False

    def outputs(self, engine_request: EngineRequest) -> AsyncIterator[Any]:
        """Return the outputs that stand for the request's own: the winner's, once the strategy has run.

        Raises:
            ParamsError: if the strategy cannot work with the request; raised here, before the first output.
        """
        self.strategy.check(engine_request.sampling_params, engine_request.max_logprobs)
        self.branches.engine_request = engine_request
        return self._outputs(engine_request)

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
        details = usage.get("prompt_tokens_details")
        if details and details.get("cached_tokens") is not None:
            cached = sum(branch.cached_tokens for branch in branches)
            total["prompt_tokens_details"] = details | {"cached_tokens": cached}
        return usage | total

    def close(self) -> None:
        """Release the reserved branches, when the HTTP request is over. Safe to call again."""
        if not self._closed:
            self._closed = True
            self.limit.release(self.strategy.max_parallel)

    async def _outputs(self, engine_request: EngineRequest) -> AsyncIterator[Any]:
        try:
            self.winner = await self.strategy.run(self.branches)
            saved = self.branches.estimated_tokens_saved()
            self.metrics.observe_result(self.strategy.type, self.branches.summary.get("agreement"), saved)
        finally:
            await self.branches.drop_running()
        for output in engine_request.as_own_outputs(self.winner.outputs):
            yield output
