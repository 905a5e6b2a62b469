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

from em_sampler.params import EXTRA_ARGS_KEY
from server.stats import GRACE, Choice, Tally, summary

DONE = "data: [DONE]"
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
        response.body_iterator = _relay(response.body_iterator, statistics if wanted else None, outcome)
        return response
    failed = response.status_code >= 500
    outcome("failed" if failed else "rejected" if response.status_code >= 400 else "completed")
    if wanted and response.status_code < 400:
        # One JSON object after another, made one: the body may be large, and is not parsed for this.
        tail = json.dumps({EXTRA_ARGS_KEY: await statistics.block()})
        response.body = bytes(response.body).rstrip()[:-1] + b"," + tail[1:].encode()
        response.headers["content-length"] = str(len(response.body))
    return response


async def _relay(
    events: AsyncIterable[Any], statistics: ReplyStatistics | None, outcome: Outcome
) -> AsyncIterator[Any]:
    """`events` as they come, one a time, with the statistics at their end."""
    ended, last = "aborted", ""
    try:
        async for event in events:
            if event.startswith('data: {"error"'):
                ended = "failed"
            elif statistics and event.startswith(DONE) and ended != "failed":
                yield _chunk(last, await statistics.block())
            elif statistics and event.startswith(RESPONSES_END):
                event = _with_block(event, await statistics.block())
            elif event.startswith("data: "):
                last = event
            yield event
        ended = "failed" if ended == "failed" else "completed"
    finally:
        outcome(ended)


def _chunk(last: str, block: list[dict[str, Any]]) -> str:
    """A chunk without choices, otherwise like the last one."""
    chunk = json.loads(last.removeprefix("data: "))
    fields = {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}
    return f"data: {json.dumps(fields | {'choices': [], EXTRA_ARGS_KEY: block})}\n\n"


def _with_block(event: str, block: list[dict[str, Any]]) -> str:
    """The event that closes a stream of the responses API, with the block beside its response's usage."""
    name, data = event.rstrip().split("\ndata: ", 1)
    content = json.loads(data)
    content["response"][EXTRA_ARGS_KEY] = block
    return f"{name}\ndata: {json.dumps(content, separators=(',', ':'))}\n\n"
