"""The branches of one request, as its strategy sees them: started in the engine, followed, cancelled.

Knows engine outputs by their attributes alone (vLLM's classes are in server/engine.py), and no HTTP.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from server.stats.collector import RequestStats, summarize
from server.strategies.metrics import StrategyMetrics

logger = logging.getLogger(__name__)

ABORT_RETRY_S = 0.05  # an abort is repeated at this interval: the engine ignores one for a request it does not know yet

# A confidence is summed in whole units of this part of a nat: sums are exact, so that equal groups have equal means.
CONFIDENCE_UNITS = 2**32

# Takes a reply; returns the prompt that asks for a better one, or None if that is longer than the context.
NextPrompt = Callable[[str], Awaitable[Any]]
# Takes a prompt's and a reply's token ids; returns how many of the latter are reasoning, by the server's parser.
CountReasoning = Callable[[Sequence[int], Sequence[int]], int]


class EngineRequest(Protocol):
    """The engine request that vLLM made for the HTTP request; branches are copies of it."""

    sampling_params: Any
    max_logprobs: int  # the server's limit; -1 for none
    logprobs_mode: str  # what the server returns as log-probabilities

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

    def collect(self, outputs: list[Any], output: Any) -> None:
        """Add a branch's next output in the form that the request's own would have: a stream of deltas, or one."""


class Branch:
    """One engine request of a strategy, and what it has generated so far."""

    def __init__(self, number: int) -> None:
        self.number = number  # 0 for the first; the branch's seed is the request's plus this
        self.state: Literal["running", "completed", "cancelled", "failed"] = "running"
        self.texts: list[str] = []  # one after another
        self.token_ids: list[int] = []
        self.prompt_token_ids: Sequence[int] = ()  # none until the prompt is prefilled
        self.cached_tokens = 0  # prompt tokens found in the prefix cache
        self.created_cache_tokens = 0  # prompt tokens added to it
        self.reasoning_tokens = 0  # once it has ended
        self.logprob = 0.0  # under the model's own distribution, summed over the tokens
        self.confidence_sums = [0]  # [i]: of the first i tokens that had a choice, if the strategy needs confidence
        self.outputs: list[Any] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.request_id = ""
        self.stats: list[RequestStats] = []
        self.task: asyncio.Task[None]

    @property
    def text(self) -> str:
        """What the branch has generated so far."""
        return "".join(self.texts)

    @property
    def tokens(self) -> int:
        """How many tokens the branch has generated so far."""
        return len(self.token_ids)

    @property
    def prompt_tokens(self) -> int:
        """The length of the prompt; 0 until it is prefilled."""
        return len(self.prompt_token_ids)

    @property
    def cut_off(self) -> bool:
        """True if the branch ended at `max_tokens` or at the end of the context."""
        return self.finish_reason == "length"

    @property
    def mean_logprob(self) -> float:
        """The log-probability per token under the model's own distribution; minus infinity if it is not known."""
        return self.logprob / self.tokens if self.tokens and math.isfinite(self.logprob) else -math.inf

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
        if not delta:
            self.texts, self.token_ids = [], []
        self.texts.append(completion.text)
        self.token_ids.extend(completion.token_ids)
        self.prompt_token_ids = output.prompt_token_ids or () if self.token_ids else ()
        self.cached_tokens = output.num_cached_tokens or 0
        self.created_cache_tokens = output.num_cache_creation_tokens or 0
        self.logprob = completion.cumulative_logprob or 0.0
        self.finish_reason = completion.finish_reason
        for token in (completion.logprobs or ()) if top_logprobs else ():
            # A number if the client did not ask for log-probabilities (ConfidenceProcessor).
            known = token_confidence(token, top_logprobs) if isinstance(token, Mapping) else token
            if known is not None:
                self.confidence_sums.append(self.confidence_sums[-1] + round(known * CONFIDENCE_UNITS))

    def give_back_outputs(self) -> None:
        """Drop the outputs: the branch will not be the reply."""
        self.outputs = []


def token_confidence(candidates: Mapping[int, Any], top: int) -> float | None:
    """Return the `confidence` of a token whose candidates are vLLM's `Logprob` by token id."""
    return confidence([candidate.logprob for candidate in candidates.values() if candidate.rank <= top])


def confidence(logprobs: Sequence[float]) -> float | None:
    """Return minus the mean log-probability of a token's likeliest candidates: high if one dominates.

    A masked candidate has no finite log-probability and does not count. None if only one is left: the token had no
    choice, which says nothing about the model. Source: arXiv 2508.15260, equation 2.
    """
    finite = [logprob for logprob in logprobs if math.isfinite(logprob)]
    return -sum(finite) / len(finite) if len(finite) > 1 else None


class NoNextPromptError(Exception):
    """There is no prompt for another round; `stopped_by` says why, as the response does."""

    def __init__(self, stopped_by: Literal["context", "template"]) -> None:
        super().__init__(stopped_by)
        self.stopped_by = stopped_by


class Branches:
    """The branches of one request. What a strategy may do is here: start, wait, cancel, and fill the summary."""

    def __init__(
        self,
        strategy: str,
        metrics: StrategyMetrics,
        next_prompt: NextPrompt,
        top_logprobs: int = 0,
        keep_going: Callable[["Branches", Branch], bool] = lambda branches, branch: True,
        count_reasoning: CountReasoning | None = None,
    ) -> None:
        """Prepare for a request; `engine_request` must be set before the first start.

        Args:
            strategy: its name, for the metrics.
            metrics: count branches as they start and end.
            next_prompt: makes refinement's prompts, or raises NoNextPromptError.
            top_logprobs: candidates for a token's confidence; 0 if the strategy does not need it.
            keep_going: called after every output; False cancels the branch.
            count_reasoning: counts a branch's reasoning tokens; None if the server has no reasoning parser.
        """
        self.strategy = strategy
        self.metrics = metrics
        self.next_prompt = next_prompt
        self.top_logprobs = top_logprobs
        self.keep_going = keep_going
        self.count_reasoning = count_reasoning
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
        failed = all(branch.state == "failed" for branch in self.started)
        problem = f"all {len(self.started)} branches failed" if failed else "no branch completed"
        return errors[0] if errors else self.engine_request.failure(problem)

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
                    self.engine_request.collect(branch.outputs, output)
            if self.count_reasoning:
                branch.reasoning_tokens = self.count_reasoning(branch.prompt_token_ids, branch.token_ids)
            if branch.state == "running":
                branch.state = "failed" if branch.finish_reason in (None, "abort", "error") else "completed"
        except Exception as error:
            branch.state, branch.error = "failed", error

    def _end(self, branch: Branch) -> None:
        if branch.state == "running":  # the task was cancelled, perhaps before its first step
            branch.state = "cancelled"
        if branch.state == "failed":
            logger.warning("em_inf: branch %s failed: %r", branch.request_id, branch.error or "aborted")
        if branch.state != "completed":
            branch.give_back_outputs()
        self.metrics.observe_end(self.strategy, branch.state)
        self._ended.put_nowait(branch)
        self.changed.set()

    async def _cancel(self, branch: Branch) -> None:
        branch.state = "cancelled"
        while not branch.task.done():
            await self.engine_request.abort(branch.request_id)
            await asyncio.wait({branch.task}, timeout=ABORT_RETRY_S)
