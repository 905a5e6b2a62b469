"""The statistics' place in a reply: beside `usage` in an object, in a chunk of its own before a stream's end.

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
from server.stats import GRACE, Choice, Tally, summary

DONE = "data: [DONE]"
ERRORS = ('data: {"error"', "event: response.failed")
RESPONSES_END = ("event: response.completed", "event: response.incomplete", "event: response.failed")

Outcome = Callable[[str], None]  # told once how the request ended: one of server.metrics.OUTCOMES


class ReplyStatistics:
    """What one HTTP request will say of its tokens, once the engine requests made for it are over."""

    def __init__(self, stats: str, each_its_choice: bool) -> None:
        """`each_its_choice`: engine requests are prompts with choices of their own, not turns of the same reply."""
        self.stats = stats
        self.each_its_choice = each_its_choice
        self.tallies: list[Tally] = []

    async def block(self) -> list[dict[str, Any]]:
        """One entry for each choice. Waits for late records, `server.stats.GRACE` seconds after the last token."""
        choices: dict[int, list[Choice]] = defaultdict(list)
        for number, tally in enumerate(self.tallies):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(tally.settled.wait(), 2 * GRACE)  # it comes after GRACE at the latest
            first = number * len(tally.choices) if self.each_its_choice else 0
            for index, choice in enumerate(tally.choices, first):
                choices[index].append(choice)
        return [summary(index, parts, self.stats == "tokens") for index, parts in sorted(choices.items())]


async def with_statistics(response: Response, statistics: ReplyStatistics, outcome: Outcome) -> Response:
    """`response` with the block that was asked for, its outcome told."""
    wanted = statistics.stats != "none"
    if isinstance(response, StreamingResponse):
        return RelayedStream(response, statistics if wanted else None, outcome)
    failed = response.status_code >= 500
    outcome("failed" if failed else "rejected" if response.status_code >= 400 else "completed")
    if wanted and response.status_code < 400:
        # One JSON object after another, made one: the body may be large, and is not parsed for this.
        tail = json.dumps({EXTRA_ARGS_KEY: await statistics.block()})
        response.body = bytes(response.body).rstrip()[:-1] + b"," + tail[1:].encode()
        response.headers["content-length"] = str(len(response.body))
    return response


class RelayedStream(StreamingResponse):
    """A stream as it comes, one event at a time, with the statistics at its end."""

    def __init__(self, stream: StreamingResponse, statistics: ReplyStatistics | None, outcome: Outcome) -> None:
        super().__init__(self._relay(stream.body_iterator, statistics), stream.status_code)
        self.raw_headers = stream.raw_headers
        self.background = stream.background
        self.outcome = outcome
        self.ended = "aborted"  # until it has

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. The outcome is told here: a generator that nobody starts would never tell."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.outcome(self.ended)

    async def _relay(self, events: AsyncIterable[Any], statistics: ReplyStatistics | None) -> AsyncIterator[Any]:
        failed, last = False, ""
        try:
            async for event in events:
                failed = failed or event.startswith(ERRORS)
                if statistics and not failed and event.startswith(DONE):
                    yield _chunk(last, await statistics.block())
                elif statistics and event.startswith(RESPONSES_END):
                    event = _with_block(event, await statistics.block())
                elif event.startswith("data: "):
                    last = event
                yield event
        except Exception:
            failed = True
            raise
        finally:
            self.ended = "failed" if failed else "aborted"
        self.ended = "failed" if failed else "completed"


def _chunk(last: str, block: list[dict[str, Any]]) -> str:
    """A chunk without choices, otherwise like the last one."""
    chunk = json.loads(last.removeprefix("data: ") or "{}")
    fields = {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}
    return f"data: {json.dumps(fields | {'choices': [], EXTRA_ARGS_KEY: block})}\n\n"


def _with_block(event: str, block: list[dict[str, Any]]) -> str:
    """The event that closes a stream of the responses API, with the block beside its response's usage."""
    name, data = event.rstrip().split("\ndata: ", 1)
    content = json.loads(data)
    content["response"][EXTRA_ARGS_KEY] = block
    return f"{name}\ndata: {json.dumps(content, separators=(',', ':'))}\n\n"
