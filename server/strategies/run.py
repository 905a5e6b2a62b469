"""The branches of one request: started in the engine, followed, ended. What a strategy sees of the engine.

Knows engine outputs by their attributes, not vLLM's classes (those are in server/engine.py), and no HTTP.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

from server.metrics import StrategyMetrics
from server.stats import GRACE, Tally, summary

if TYPE_CHECKING:
    from server.strategies.base import Strategy

logger = logging.getLogger(__name__)

ABORT_AGAIN = 0.05  # seconds; an abort that comes before the engine knows the request does nothing

Render = Callable[[str], Awaitable[Any | None]]  # a reply in; the prompt that asks for a better one, None if too long


class Origin(Protocol):
    """The engine request that vLLM made of the HTTP request: branches are copies of it."""

    sampling_params: Any
    max_logprobs: int  # the server's limit; -1 for none

    def branch(
        self, number: int, prompt: Any | None, logprobs: int, every_token: bool
    ) -> tuple[str, bool, AsyncIterator[Any], list[Tally]]:
        """Its request id, whether its outputs are deltas, the outputs, and its tally where it has one."""

    async def abort(self, request_id: str) -> None:
        """End it; its last output comes then, with the finish reason "abort"."""

    def failure(self, message: str) -> Exception:
        """What to raise where the engine has failed the request."""

    def replayed(self, outputs: list[Any]) -> list[Any]:
        """A branch's outputs, as the HTTP request's own engine request would have had them."""


class TooManyBranchesError(Exception):
    """There is no place for so many now."""


class Places:
    """How many branches may be in flight in this process, whoever asked for them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    def take(self, branches: int) -> None:
        """Raises TooManyBranchesError where there are not so many left."""
        if self.taken + branches > self.limit:
            free = self.limit - self.taken
            raise TooManyBranchesError(f"{branches} branches asked for, {free} of {self.limit} places are free")
        self.taken += branches

    def give_back(self, branches: int) -> None:
        """After `take`."""
        self.taken -= branches


class Branch:
    """One engine request of a strategy, as far as it has come."""

    def __init__(self, number: int) -> None:
        self.number = number  # its seed is the request's, plus this
        self.state: Literal["running", "completed", "cancelled", "failed"] = "running"
        self.text = ""
        self.tokens = 0
        self.prompt_tokens = 0  # 0 until it was prefilled
        self.cached_tokens = 0  # of these, found in the prefix cache
        self.logprob = 0.0  # the model's own, summed over the tokens
        self.confidence_sums = [0.0]  # over its first tokens, 0 of them and up, where the strategy looks at each
        self.outputs: list[Any] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.request_id = ""
        self.tallies: list[Tally] = []
        self.task: asyncio.Task[None]

    @property
    def cut_off(self) -> bool:
        """Whether it ended for want of room: `max_tokens`, or the context."""
        return self.finish_reason == "length"

    @property
    def mean_logprob(self) -> float:
        """Per token; minus infinity without any."""
        return self.logprob / self.tokens if self.tokens else -float("inf")

    async def mean_entropy(self) -> float | None:
        """Nats per token before the method, once its statistics have come; None where none came."""
        if not self.tallies:
            return None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.tallies[0].settled.wait(), 2 * GRACE)
        entropy: float | None = summary(0, self.tallies[0].choices, every_token=False)["entropy_before"]
        return entropy

    def take(self, output: Any, delta: bool, confidence_of: int) -> None:
        """The next output. `confidence_of`: top log-probabilities that make a token's confidence; 0 for none."""
        completion = output.outputs[0]
        self.text = self.text + completion.text if delta else completion.text
        self.tokens = self.tokens + len(completion.token_ids) if delta else len(completion.token_ids)
        self.prompt_tokens = len(output.prompt_token_ids or ()) if self.tokens else 0
        self.cached_tokens = output.num_cached_tokens or 0
        self.logprob = completion.cumulative_logprob or 0.0
        self.finish_reason = completion.finish_reason
        if confidence_of:
            for row in completion.logprobs or ():
                self.confidence_sums.append(self.confidence_sums[-1] + confidence(row, confidence_of))
        self.outputs.append(output)


def confidence(row: Any, top: int) -> float:
    """Minus the mean log-probability of a token's `top` candidates (arXiv 2508.15260, equation 2): high where one
    dominates."""
    logprobs: list[float] = [entry.logprob for entry in row.values() if entry.rank <= top]
    return -sum(logprobs) / len(logprobs)


class Run:
    """One request under a strategy. Everything a strategy may do is a method here."""

    def __init__(
        self,
        strategy: "Strategy",
        places: Places,
        metrics: StrategyMetrics,
        render: Render,
        head: Callable[[], dict[str, Any]],
    ) -> None:
        """Takes the request's places, until `close`.

        Args:
            render: refinement's next prompt.
            head: the fields that all chunks of the stream have.

        Raises:
            TooManyBranchesError: where there are none.
        """
        places.take(strategy.width)
        self.strategy = strategy
        self.places = places
        self.metrics = metrics
        self.render = render
        self.head = head
        self.origin: Origin
        self.branches: list[Branch] = []
        self.winner: Branch | None = None
        self.report: dict[str, Any] = {}  # what the strategy says in the response
        self.spared = 0  # branches that an early stop left unstarted
        self.changed = asyncio.Event()  # there is progress to tell
        self._ended: asyncio.Queue[Branch] = asyncio.Queue()
        self._delivered = 0
        self._closed = False

    # ---- For strategies

    def start(self, prompt: Any | None = None) -> Branch:
        """A new branch, from the request's own prompt where none is given."""
        branch = Branch(len(self.branches))
        top, every_token = self.strategy.confidence_of, self.strategy.confidence_of > 0
        branch.request_id, delta, outputs, branch.tallies = self.origin.branch(branch.number, prompt, top, every_token)
        self.branches.append(branch)
        self.metrics.started(self.strategy.type)
        self.changed.set()
        branch.task = asyncio.create_task(self._follow(branch, outputs, delta))
        branch.task.add_done_callback(lambda _: self._end(branch))
        return branch

    async def ended(self) -> AsyncIterator[Branch]:
        """Branches as they end, of themselves or not, until all that were started have."""
        while self._delivered < len(self.branches):
            branch = await self._ended.get()
            self._delivered += 1
            yield branch

    async def cancel_running(self) -> None:
        """End them in the engine; their tokens so far are known when this returns."""
        await asyncio.gather(*(self._cancel(branch) for branch in self.branches if branch.state == "running"))

    def failure(self) -> Exception:
        """What to raise where no branch was completed."""
        errors = [branch.error for branch in self.branches if branch.error]
        return errors[0] if errors else self.origin.failure(f"all {len(self.branches)} branches failed")

    # ---- For the server

    def outputs(self, origin: Origin) -> AsyncIterator[Any]:
        """The outputs that stand for the HTTP request's own: those of the branch that won.

        Raises:
            ParamsError: at once, for a request that the strategy cannot work with.
        """
        self.strategy.check(origin.sampling_params, origin.max_logprobs)
        self.origin = origin
        return self._outputs()

    def block(self) -> dict[str, Any]:
        """The response's `strategy` block. Contract: docs/http.md."""
        states = Counter(branch.state for branch in self.branches)
        counts = {state: states[state] for state in ("completed", "cancelled", "failed")}
        running = {"running": states["running"]} if states["running"] else {}
        tokens = {"completion_tokens": [branch.tokens for branch in self.branches]}
        return self.strategy.heading() | counts | running | self.report | tokens

    async def progress(self, reply: asyncio.Future[Any], limit: float) -> None:
        """Wait until a branch has started or ended since the last time, or the `reply` has begun: at most `limit` s."""
        change = asyncio.ensure_future(self.changed.wait())
        await asyncio.wait({reply, change}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        change.cancel()
        self.changed.clear()

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """vLLM's usage, which knows of the winner alone, with all that was generated."""
        prompt, completion = (sum(getattr(b, name) for b in self.branches) for name in ("prompt_tokens", "tokens"))
        total = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        details = usage.get("prompt_tokens_details")
        if details and details.get("cached_tokens") is not None:
            total["prompt_tokens_details"] = details | {"cached_tokens": sum(b.cached_tokens for b in self.branches)}
        return usage | total

    def close(self) -> None:
        """The HTTP request is over. Safe to call again."""
        if not self._closed:
            self._closed = True
            self.places.give_back(self.strategy.width)

    async def _outputs(self) -> AsyncIterator[Any]:
        try:
            self.winner = await self.strategy.run(self)
            self.metrics.decided(self.strategy.type, self.report.get("agreement"), self._saved())
        finally:  # also where the client has gone
            running = [branch for branch in self.branches if branch.state == "running"]
            for branch in running:
                branch.task.cancel()
            await asyncio.gather(*(branch.task for branch in running), return_exceptions=True)
        for output in self.origin.replayed(self.winner.outputs):
            yield output

    async def _follow(self, branch: Branch, outputs: AsyncIterator[Any], delta: bool) -> None:
        try:
            async for output in outputs:
                branch.take(output, delta, self.strategy.confidence_of)
                if branch.state == "running" and not output.finished and not self.strategy.keeps(self, branch):
                    branch.state = "cancelled"
                    await self.origin.abort(branch.request_id)
            if branch.state == "running":
                branch.state = "failed" if branch.finish_reason in (None, "abort", "error") else "completed"
        except Exception as error:
            branch.state, branch.error = "failed", error

    def _end(self, branch: Branch) -> None:
        if branch.state == "running":  # its task was cancelled, perhaps before it began
            branch.state = "cancelled"
        if branch.state == "failed":
            logger.warning("em_inf: branch %s failed: %r", branch.request_id, branch.error or "aborted")
        self.metrics.ended(self.strategy.type, branch.state)
        self._ended.put_nowait(branch)
        self.changed.set()

    async def _cancel(self, branch: Branch) -> None:
        branch.state = "cancelled"
        while not branch.task.done():
            await self.origin.abort(branch.request_id)
            await asyncio.wait({branch.task}, timeout=ABORT_AGAIN)

    def _saved(self) -> float:
        """Tokens that branches cancelled or spared would have taken, as long as the completed ones on average."""
        lengths = [branch.tokens for branch in self.branches if branch.state == "completed"]
        mean = sum(lengths) / len(lengths) if lengths else 0.0
        cancelled = sum(max(0.0, mean - branch.tokens) for branch in self.branches if branch.state == "cancelled")
        return cancelled + mean * self.spared
