"""The branches of one request, as its strategy sees them: started in the engine, followed, cancelled.

Knows engine outputs by their attributes alone (vLLM's classes are in server/engine.py), and no HTTP.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal, Protocol

from server.stats.collector import RequestStats, summarize
from server.strategies.metrics import StrategyMetrics

logger = logging.getLogger(__name__)

ABORT_RETRY_S = 0.05  # an abort is repeated at this interval: the engine ignores one for a request it does not know yet

# Takes a reply; returns the prompt that asks for a better one, or None if that is longer than the context.
NextPrompt = Callable[[str], Awaitable[Any | None]]


class EngineRequest(Protocol):
    """The engine request that vLLM made for the HTTP request; branches are copies of it."""

    sampling_params: Any
    max_logprobs: int  # the server's limit; -1 for none

    def branch(
        self, number: int, prompt: Any | None, logprobs: int, every_token: bool
    ) -> tuple[str, bool, AsyncIterator[Any], list[RequestStats]]:
        """Send a copy of the request to the engine.

        Args:
            number: the branch's; added to the request's seed.
            prompt: replaces the request's prompt; None keeps it.
            logprobs: top log-probabilities that the outputs must have at least.
            every_token: ask for an output after each token, even if the HTTP response is not streamed.

        Returns:
            The copy's request id, whether its outputs are deltas, its outputs, and its stats if any are collected.
        """

    async def abort(self, request_id: str) -> None:
        """Ask the engine to end a branch, whose last output then has the finish reason "abort"."""

    def failure(self, message: str) -> Exception:
        """Make the exception to raise if the engine failed all branches."""

    def as_own_outputs(self, outputs: list[Any]) -> list[Any]:
        """Return a branch's outputs in the form that the request's own would have: a stream of deltas, or one."""


class Branch:
    """One engine request of a strategy, and what it has generated so far."""

    def __init__(self, number: int) -> None:
        self.number = number  # 0 for the first; the branch's seed is the request's plus this
        self.state: Literal["running", "completed", "cancelled", "failed"] = "running"
        self.text = ""
        self.tokens = 0
        self.prompt_tokens = 0  # 0 until the prompt is prefilled
        self.cached_tokens = 0  # prompt tokens found in the prefix cache
        self.logprob = 0.0  # under the model's own distribution, summed over the tokens
        self.confidence_sums = [0.0]  # [i]: over the first i tokens, if the strategy needs confidence
        self.outputs: list[Any] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.request_id = ""
        self.stats: list[RequestStats] = []
        self.task: asyncio.Task[None]

    @property
    def cut_off(self) -> bool:
        """True if the branch ended at `max_tokens` or at the end of the context."""
        return self.finish_reason == "length"

    @property
    def mean_logprob(self) -> float:
        """The log-probability per token under the model's own distribution; minus infinity without tokens."""
        return self.logprob / self.tokens if self.tokens else -float("inf")

    async def mean_entropy(self) -> float | None:
        """Wait for the branch's stats and return its mean entropy before the method, in nats; None without stats."""
        if not self.stats:
            return None
        await self.stats[0].wait()
        entropy: float | None = summarize(0, self.stats[0].choices, per_token=False)["entropy_before"]
        return entropy

    def add(self, output: Any, delta: bool, top_logprobs: int) -> None:
        """Add the next output; `top_logprobs` candidates give a token's confidence, 0 if it is not needed."""
        completion = output.outputs[0]
        self.text = self.text + completion.text if delta else completion.text
        self.tokens = self.tokens + len(completion.token_ids) if delta else len(completion.token_ids)
        self.prompt_tokens = len(output.prompt_token_ids or ()) if self.tokens else 0
        self.cached_tokens = output.num_cached_tokens or 0
        self.logprob = completion.cumulative_logprob or 0.0
        self.finish_reason = completion.finish_reason
        if top_logprobs:
            for candidates in completion.logprobs or ():
                self.confidence_sums.append(self.confidence_sums[-1] + confidence(candidates, top_logprobs))
        self.outputs.append(output)


def confidence(candidates: Any, top: int) -> float:
    """Return minus the mean log-probability of a token's `top` likeliest candidates: high if one dominates.

    `candidates` maps token ids to vLLM's `Logprob`. Source: arXiv 2508.15260, equation 2.
    """
    logprobs: list[float] = [candidate.logprob for candidate in candidates.values() if candidate.rank <= top]
    return -sum(logprobs) / len(logprobs)


class Branches:
    """The branches of one request. What a strategy may do is here: start, wait, cancel, and fill the summary."""

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
            strategy: its name, for the metrics.
            metrics: count branches as they start and end.
            next_prompt: makes refinement's prompts.
            top_logprobs: candidates for a token's confidence; 0 if the strategy does not need it.
            keep_going: called after every output; False cancels the branch.
        """
        self.strategy = strategy
        self.metrics = metrics
        self.next_prompt = next_prompt
        self.top_logprobs = top_logprobs
        self.keep_going = keep_going
        self.engine_request: EngineRequest
        self.started: list[Branch] = []
        self.summary: dict[str, Any] = {}  # the strategy's part of the response's summary
        self.never_started = 0  # branches that an early stop made unnecessary
        self.changed = asyncio.Event()  # set if a branch has started or ended
        self._ended: asyncio.Queue[Branch] = asyncio.Queue()
        self._yielded = 0  # by as_they_end

    def start(self, prompt: Any | None = None) -> Branch:
        """Start a branch, from `prompt` if it is given, otherwise from the request's prompt."""
        branch = Branch(len(self.started))
        branch.request_id, delta, outputs, branch.stats = self.engine_request.branch(
            branch.number, prompt, self.top_logprobs, every_token=self.top_logprobs > 0
        )
        self.started.append(branch)
        self.metrics.observe_start(self.strategy)
        self.changed.set()
        branch.task = asyncio.create_task(self._follow(branch, outputs, delta))
        branch.task.add_done_callback(lambda _: self._end(branch))
        return branch

    async def as_they_end(self) -> AsyncIterator[Branch]:
        """Yield each branch when it completes, fails or is cancelled, until none is running."""
        while self._yielded < len(self.started):
            branch = await self._ended.get()
            self._yielded += 1
            yield branch

    async def cancel_running(self) -> None:
        """Cancel the running branches in the engine; their token counts are final when this returns."""
        await asyncio.gather(*(self._cancel(branch) for branch in self.started if branch.state == "running"))

    async def drop_running(self) -> None:
        """Stop following the running branches, if the client has gone: closing their outputs aborts them."""
        running = [branch for branch in self.started if branch.state == "running"]
        for branch in running:
            branch.task.cancel()
        await asyncio.gather(*(branch.task for branch in running), return_exceptions=True)

    def failure(self) -> Exception:
        """Make the exception to raise if no branch completed."""
        errors = [branch.error for branch in self.started if branch.error]
        return errors[0] if errors else self.engine_request.failure(f"all {len(self.started)} branches failed")

    def estimated_tokens_saved(self) -> float:
        """Return the tokens that the other branches lack to the mean length of the completed ones.

        An estimate of what cancelling branches, or never starting them, has saved.
        """
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
        if branch.state == "running":  # the task was cancelled, perhaps before its first step
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
