"""The branches of one request, as a strategy sees them: started in the engine, followed, cancelled.

Knows engine outputs by their attributes, not vLLM's classes (those are in server/engine.py), and no HTTP.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal, Protocol

from server.stats.collector import RequestStats, summarize
from server.strategies.metrics import StrategyMetrics

logger = logging.getLogger(__name__)

ABORT_RETRY_S = 0.05  # the engine ignores an abort that comes before it knows the request: send it again

# Takes a reply; returns the prompt that asks for a better one, None if it would be longer than the context.
NextPrompt = Callable[[str], Awaitable[Any | None]]


class EngineRequest(Protocol):
    """The engine request that vLLM made of the HTTP request: branches are copies of it."""

    sampling_params: Any
    max_logprobs: int  # the server's limit; -1 for none

    def branch(
        self, number: int, prompt: Any | None, logprobs: int, every_token: bool
    ) -> tuple[str, bool, AsyncIterator[Any], list[RequestStats]]:
        """Copy the request and send the copy to the engine.

        Args:
            number: added to the request's seed.
            prompt: replaces the request's own; None keeps it.
            logprobs: top log-probabilities that the outputs must carry at least.
            every_token: ask for an output after each token, even if the HTTP reply is not streamed.

        Returns:
            Its request id, whether its outputs are deltas, the outputs, and its stats if any are collected.
        """

    async def abort(self, request_id: str) -> None:
        """End a branch; its last output comes then, with the finish reason "abort"."""

    def failure(self, message: str) -> Exception:
        """Make the exception to raise if the engine failed the request."""

    def as_own_outputs(self, outputs: list[Any]) -> list[Any]:
        """Shape a branch's outputs as the HTTP request's own engine request would have given them."""


class Branch:
    """One engine request of a strategy, with what it has generated so far."""

    def __init__(self, number: int) -> None:
        self.number = number  # its seed is the request's, plus this
        self.state: Literal["running", "completed", "cancelled", "failed"] = "running"
        self.text = ""
        self.tokens = 0
        self.prompt_tokens = 0  # 0 until it was prefilled
        self.cached_tokens = 0  # of these, found in the prefix cache
        self.logprob = 0.0  # the model's own, summed over the tokens
        self.confidence_sums = [0.0]  # [i]: over the first i tokens, if the strategy asks for confidence
        self.outputs: list[Any] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.request_id = ""
        self.stats: list[RequestStats] = []
        self.task: asyncio.Task[None]

    @property
    def cut_off(self) -> bool:
        """Whether it ended at `max_tokens` or at the end of the context."""
        return self.finish_reason == "length"

    @property
    def mean_logprob(self) -> float:
        """The model's own log-probability per token; minus infinity without any token."""
        return self.logprob / self.tokens if self.tokens else -float("inf")

    async def mean_entropy(self) -> float | None:
        """Wait for the branch's stats; return its mean entropy before the method, in nats, None if none arrived."""
        if not self.stats:
            return None
        await self.stats[0].wait()
        entropy: float | None = summarize(0, self.stats[0].choices, per_token=False)["entropy_before"]
        return entropy

    def add(self, output: Any, delta: bool, top_logprobs: int) -> None:
        """Add the next output. `top_logprobs`: candidates that make a token's confidence; 0 if nobody asks for it."""
        completion = output.outputs[0]
        self.text = self.text + completion.text if delta else completion.text
        self.tokens = self.tokens + len(completion.token_ids) if delta else len(completion.token_ids)
        self.prompt_tokens = len(output.prompt_token_ids or ()) if self.tokens else 0
        self.cached_tokens = output.num_cached_tokens or 0
        self.logprob = completion.cumulative_logprob or 0.0
        self.finish_reason = completion.finish_reason
        if top_logprobs:
            for row in completion.logprobs or ():
                self.confidence_sums.append(self.confidence_sums[-1] + confidence(row, top_logprobs))
        self.outputs.append(output)


def confidence(row: Any, top: int) -> float:
    """Return minus the mean log-probability of a token's `top` candidates: high if one of them dominates.

    Source: arXiv 2508.15260, equation 2.
    """
    logprobs: list[float] = [entry.logprob for entry in row.values() if entry.rank <= top]
    return -sum(logprobs) / len(logprobs)


class Branches:
    """Everything a strategy may do: start branches, wait for them, cancel them, report."""

    def __init__(
        self,
        strategy: str,
        metrics: StrategyMetrics,
        next_prompt: NextPrompt,
        top_logprobs: int = 0,
        keep_going: Callable[["Branches", Branch], bool] = lambda branches, branch: True,
    ) -> None:
        """Prepare for a request; `engine_request` must be set before the first start.

        Args:
            strategy: its name, the label of the metrics.
            metrics: counts branches as they start and end.
            next_prompt: for refinement.
            top_logprobs: candidates that make a token's confidence; 0 if the strategy does not ask for it.
            keep_going: asked after every output; False cancels the branch.
        """
        self.strategy = strategy
        self.metrics = metrics
        self.next_prompt = next_prompt
        self.top_logprobs = top_logprobs
        self.keep_going = keep_going
        self.engine_request: EngineRequest
        self.started: list[Branch] = []
        self.report: dict[str, Any] = {}  # the strategy's own fields in the response
        self.never_started = 0  # branches that an early stop saved
        self.changed = asyncio.Event()  # a branch has started or ended
        self._ended: asyncio.Queue[Branch] = asyncio.Queue()
        self._delivered = 0

    def start(self, prompt: Any | None = None) -> Branch:
        """Start a branch, from `prompt` or else from the request's own prompt."""
        branch, top = Branch(len(self.started)), self.top_logprobs
        branch.request_id, delta, outputs, branch.stats = self.engine_request.branch(
            branch.number, prompt, top, top > 0
        )
        self.started.append(branch)
        self.metrics.observe_start(self.strategy)
        self.changed.set()
        branch.task = asyncio.create_task(self._follow(branch, outputs, delta))
        branch.task.add_done_callback(lambda _: self._end(branch))
        return branch

    async def as_they_end(self) -> AsyncIterator[Branch]:
        """Yield each branch when it completes, fails or is cancelled, until none is running."""
        while self._delivered < len(self.started):
            branch = await self._ended.get()
            self._delivered += 1
            yield branch

    async def cancel_running(self) -> None:
        """Cancel the running branches in the engine; their token counts are final when this returns."""
        await asyncio.gather(*(self._cancel(branch) for branch in self.started if branch.state == "running"))

    async def drop_running(self) -> None:
        """Stop following the running branches, for a client that has gone; closing their outputs aborts them."""
        running = [branch for branch in self.started if branch.state == "running"]
        for branch in running:
            branch.task.cancel()
        await asyncio.gather(*(branch.task for branch in running), return_exceptions=True)

    def failure(self) -> Exception:
        """Make the exception to raise if no branch completed."""
        errors = [branch.error for branch in self.started if branch.error]
        return errors[0] if errors else self.engine_request.failure(f"all {len(self.started)} branches failed")

    def estimated_tokens_saved(self) -> float:
        """Estimate what cancelled and never-started branches would have cost at the completed ones' mean length."""
        lengths = [branch.tokens for branch in self.started if branch.state == "completed"]
        mean = sum(lengths) / len(lengths) if lengths else 0.0
        cancelled = sum(max(0.0, mean - branch.tokens) for branch in self.started if branch.state == "cancelled")
        return cancelled + mean * self.never_started

    async def _follow(self, branch: Branch, outputs: AsyncIterator[Any], delta: bool) -> None:
        try:
            async for output in outputs:
                branch.add(output, delta, self.top_logprobs)
                if branch.state == "running" and not output.finished and not self.keep_going(self, branch):
                    branch.state = "cancelled"
                    await self.engine_request.abort(branch.request_id)
            if branch.state == "running":
                branch.state = "failed" if branch.finish_reason in (None, "abort", "error") else "completed"
        except Exception as error:
            branch.state, branch.error = "failed", error

    def _end(self, branch: Branch) -> None:
        if branch.state == "running":  # its task was cancelled, perhaps before it began
            branch.state = "cancelled"
        if branch.state == "failed":
            logger.warning("em_inf: branch %s failed: %r", branch.request_id, branch.error or "aborted")
        self.metrics.observe_end(self.strategy, branch.state)
        self._ended.put_nowait(branch)
        self.changed.set()

    async def _cancel(self, branch: Branch) -> None:
        branch.state = "cancelled"
        while not branch.task.done():
            await self.engine_request.abort(branch.request_id)
            await asyncio.wait({branch.task}, timeout=ABORT_RETRY_S)
