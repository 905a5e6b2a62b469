"""What we say in a reply: beside `usage` in an object, in a chunk of its own before a stream's end.

Knows responses as bytes and server-sent events, not vLLM's types. Contract: docs/http.md.
"""

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from em_sampler.params import EXTRA_ARGS_KEY
from server.stats.collector import RESPONSE_TIMEOUT_S, ChoiceStats, RequestStats, summarize
from server.strategies.registry import STRATEGY_KEY
from server.strategies.run import StrategyRun

DONE = "data: [DONE]"
ERRORS = ('data: {"error"', "event: response.failed")
USAGE = '"usage":{'  # as a key: in a string its quotes would be escaped
PROGRESS = 5.0  # seconds without one after which a strategy's stream has a chunk, to keep the connection open
RESPONSES_END = ("event: response.completed", "event: response.incomplete", "event: response.failed")

Outcome = Callable[[str], None]  # told once how the request ended: one of server.stats.metrics.OUTCOMES


class ReplyStatistics:
    """What one HTTP request will say of its tokens and its strategy, once the engine requests made for it are over."""

    def __init__(self, stats: str, each_its_choice: bool, run: StrategyRun | None = None) -> None:
        """`each_its_choice`: engine requests are prompts with choices of their own, not turns of the same reply."""
        self.stats = stats
        self.each_its_choice = each_its_choice
        self.run = run
        self.tallies: list[RequestStats] = []

    @property
    def wanted(self) -> bool:
        """Whether there is anything to say."""
        return self.run is not None or self.stats != "none"

    async def fields(self) -> dict[str, Any]:
        """The fields that a reply has besides vLLM's."""
        fields: dict[str, Any] = {}
        if self.run:
            fields[STRATEGY_KEY] = self.run.summary()
            self.tallies = self.run.winner.stats if self.run.winner else []
        if self.stats != "none":
            fields[EXTRA_ARGS_KEY] = await self.block()
        return fields

    def corrected(self, content: str) -> str:
        """An object of vLLM's whose usage knows of one engine request, with that of all."""
        if self.run is None or USAGE not in content:
            return content
        parsed = json.loads(content)
        return _json(parsed | {"usage": self.run.usage(parsed["usage"])})

    async def block(self) -> list[dict[str, Any]]:
        """One entry for each choice. Waits for late records, see `RequestStats.wait`."""
        choices: dict[int, list[ChoiceStats]] = defaultdict(list)
        for number, tally in enumerate(self.tallies):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    tally.final.wait(), 2 * RESPONSE_TIMEOUT_S
                )  # it comes after GRACE at the latest
            first = number * len(tally.choices) if self.each_its_choice else 0
            for index, choice in enumerate(tally.choices, first):
                choices[index].append(choice)
        return [summarize(index, parts, self.stats == "tokens") for index, parts in sorted(choices.items())]


async def with_statistics(response: Response, statistics: ReplyStatistics, outcome: Outcome) -> Response:
    """`response` with the block that was asked for, its outcome told."""
    if isinstance(response, StreamingResponse):
        return RelayedStream(response, statistics if statistics.wanted else None, outcome)
    failed = response.status_code >= 500
    outcome("failed" if failed else "rejected" if response.status_code >= 400 else "completed")
    if statistics.wanted and response.status_code < 400:
        # One JSON object after another, made one: the body may be large, and is not parsed for this.
        head = statistics.corrected(bytes(response.body).decode()).rstrip()[:-1]
        response.body = f"{head},{_json(await statistics.fields())[1:]}".encode()
        response.headers["content-length"] = str(len(response.body))
    return response


class RelayedStream(StreamingResponse):
    """A stream as it comes, one event at a time, with the statistics at its end."""

    def __init__(self, stream: StreamingResponse, statistics: ReplyStatistics | None, outcome: Outcome) -> None:
        super().__init__(self._relay(_told(stream.body_iterator, statistics), statistics), stream.status_code)
        self.raw_headers = stream.raw_headers
        self.background = stream.background
        self.outcome = outcome
        self.ended = "aborted"  # until it has

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. The outcome is told here: a generator that nobody starts would never tell."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self.body_iterator.aclose()  # type: ignore[attr-defined]  # now, where the client has gone
            finally:
                self.outcome(self.ended)

    async def _relay(self, events: AsyncIterable[Any], statistics: ReplyStatistics | None) -> AsyncIterator[Any]:
        failed, last = False, ""
        try:
            async for event in events:
                failed = failed or event.startswith(ERRORS)
                if statistics and not failed and event.startswith(DONE):
                    yield _chunk(last, await statistics.fields())
                elif statistics and event.startswith(RESPONSES_END):
                    event = _with_fields(event, await statistics.fields())
                elif event.startswith("data: "):
                    last = event
                    if statistics and not failed:
                        event = f"data: {statistics.corrected(event[6:].rstrip())}\n\n"
                yield event
        except Exception:
            failed = True
            raise
        finally:
            self.ended = "failed" if failed else "aborted"
        self.ended = "failed" if failed else "completed"


async def _told(events: AsyncIterable[Any], statistics: ReplyStatistics | None) -> AsyncIterator[Any]:
    """`events`, and before the first of them a chunk for each step of the strategy, if there is one."""
    run = statistics.run if statistics else None
    iterator = aiter(events)
    if run:
        first = asyncio.ensure_future(anext(iterator, ""))
        try:
            await run.progress(first, PROGRESS)
            while not first.done():
                yield _chunk(json.dumps(run.chunk_header()), {STRATEGY_KEY: run.summary()})
                await run.progress(first, PROGRESS)
            if first.result():
                yield first.result()
        finally:
            first.cancel()  # where the client has gone
            await asyncio.gather(first, return_exceptions=True)
    async for event in iterator:
        yield event


def _chunk(last: str, fields: dict[str, Any]) -> str:
    """A chunk without choices, otherwise like the last one."""
    chunk = json.loads(last.removeprefix("data: ") or "{}")
    kept = {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}
    return f"data: {_json(kept | {'choices': []} | fields)}\n\n"


def _with_fields(event: str, fields: dict[str, Any]) -> str:
    """The event that closes a stream of the responses API, with our fields beside its response's usage."""
    name, data = event.rstrip().split("\ndata: ", 1)
    content = json.loads(data)
    content["response"] |= fields
    return f"{name}\ndata: {_json(content)}\n\n"


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
