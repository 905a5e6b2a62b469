"""What we add to a response: `em_inf` and `strategy`, beside `usage` in an object and in the last chunk of a stream.

Knows responses as bytes and server-sent events, not vLLM's types. Contract: docs/http.md.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from em_sampler.params import EXTRA_ARGS_KEY
from server.stats.collector import ChoiceStats, RequestStats, TokenTexts, summarize
from server.strategies.registry import STRATEGY_KEY
from server.strategies.run import StrategyRun

DONE = "data: [DONE]"
ERROR = 'data: {"error"'
USAGE = '"usage":{'  # matches the key alone: inside a string the quotes would be escaped
NO_CHOICES = '"choices":[]'  # with a usage: the chunk of the total usage, vLLM's last before [DONE]
RESPONSES_API_END = ("event: response.completed", "event: response.incomplete", "event: response.failed")
PROGRESS_INTERVAL_S = 5.0  # a strategy's stream has a chunk at least this often before its reply: keeps it connected

OnOutcome = Callable[[str], None]  # called once, when the request has ended, with one of server.stats.metrics.OUTCOMES


class ResponseExtras:
    """What one response has besides vLLM's fields. Complete once the engine requests made for it have finished."""

    def __init__(
        self,
        stats: str,
        one_choice_set_per_prompt: bool,
        run: StrategyRun | None = None,
        continuous_usage: bool = False,
        top: int = 0,
        texts: TokenTexts | None = None,
    ) -> None:
        """Prepare an HTTP request's extras.

        Args:
            stats: what the request asked for: none, summary or tokens.
            one_choice_set_per_prompt: True for /v1/completions, where each prompt's engine request adds choices of the
                response; elsewhere several engine requests are turns that make up the same choice.
            run: the request's strategy, if it has one.
            continuous_usage: True if the client asked for a usage in every chunk of the stream.
            top: with stats "tokens", how many candidates of each token.
            texts: what gives the candidates' texts.
        """
        self.stats = stats
        self.one_choice_set_per_prompt = one_choice_set_per_prompt
        self.run = run
        self.continuous_usage = continuous_usage
        self.top, self.texts = top, texts
        self.request_stats: list[RequestStats] = []  # of the engine requests made for it, in order (server/engine.py)

    def has_fields(self) -> bool:
        """Return whether the response gets any field from us."""
        return self.run is not None or self.stats != "none"

    async def fields(self) -> dict[str, Any]:
        """Return our fields of the response, after waiting for the last of its stats."""
        fields: dict[str, Any] = {}
        if self.run:
            fields[STRATEGY_KEY] = self.run.summary()
            self.request_stats = self.run.winner.stats if self.run.winner else []
        if self.stats != "none":
            fields[EXTRA_ARGS_KEY] = await self.em_inf_summary()
        return fields

    def progress(self, run: StrategyRun) -> str:
        """Return a chunk with the strategy as it stands, and its usage so far if every chunk has one."""
        usage = {"usage": run.usage({})} if self.continuous_usage else {}
        return _event(run.chunk_header() | {"choices": [], STRATEGY_KEY: run.summary()} | usage)

    async def em_inf_summary(self) -> list[dict[str, Any]]:
        """Return a summary of each choice, in order. Waits for late stats, but not long: see `RequestStats.wait`."""
        choices: dict[int, list[ChoiceStats]] = defaultdict(list)
        for number, request in enumerate(self.request_stats):
            await request.wait()
            first = number * len(request.choices) if self.one_choice_set_per_prompt else 0
            for index, choice in enumerate(request.choices, first):
                choices[index].append(choice)
        how = (self.stats == "tokens", self.top, self.texts)
        return [summarize(index, parts, *how) for index, parts in sorted(choices.items())]

    def fix_usage(self, content: str) -> str:
        """Return vLLM's JSON object with the usage of all branches, if it has the usage of one."""
        if self.run is None or USAGE not in content:
            return content
        parsed = json.loads(content)
        return _json(parsed | {"usage": self.run.usage(parsed["usage"])})


async def with_extras(response: Response, extras: ResponseExtras, on_outcome: OnOutcome) -> Response:
    """Return the response with `extras`; `on_outcome` is called now, or at the end of a stream."""
    if isinstance(response, StreamingResponse):
        return ExtendedStream(response, extras if extras.has_fields() else None, on_outcome)
    failed = response.status_code >= 500
    on_outcome("failed" if failed else "rejected" if response.status_code >= 400 else "completed")
    if extras.has_fields() and response.status_code < 400:
        # Our fields are spliced in before the closing brace: the body may be large, so it is not parsed for this.
        body = extras.fix_usage(bytes(response.body).decode()).rstrip()[:-1]
        response.body = f"{body},{_json(await extras.fields())[1:]}".encode()
        response.headers["content-length"] = str(len(response.body))
    return response


class ExtendedStream(StreamingResponse):
    """vLLM's stream, passed on event by event, with our fields at its end."""

    def __init__(self, stream: StreamingResponse, extras: ResponseExtras | None, on_outcome: OnOutcome) -> None:
        super().__init__(self._extend(_with_progress(stream.body_iterator, extras), extras), stream.status_code)
        self.raw_headers = stream.raw_headers
        self.background = stream.background
        self.on_outcome = on_outcome
        self.outcome = "aborted"  # until the stream has ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, then report its outcome: here, since a generator that never starts cannot report."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self.body_iterator.aclose()  # type: ignore[attr-defined]  # at once, if the client has gone
            finally:
                self.on_outcome(self.outcome)

    async def _extend(self, events: AsyncIterable[Any], extras: ResponseExtras | None) -> AsyncIterator[Any]:
        outcome, last, added = "completed", "", False
        try:
            async for event in events:
                if event.startswith(ERROR):
                    outcome = _outcome(event)
                elif event.startswith("event: response.failed"):
                    outcome = "failed"
                if extras and event.startswith(RESPONSES_API_END):
                    event = _with_fields(event, await extras.fields())
                elif extras and outcome == "completed" and event.startswith("data: "):
                    if event.startswith(DONE):
                        if not added:
                            yield _event(_header(last) | {"choices": []} | await extras.fields())
                    else:
                        last, content = event, extras.fix_usage(event[6:].rstrip())
                        if NO_CHOICES in content and USAGE in content:  # clients take the usage of the last chunk
                            content, added = f"{content[:-1]},{_json(await extras.fields())[1:]}", True
                        event = f"data: {content}\n\n"
                yield event
        except Exception:
            self.outcome = "failed"
            raise
        self.outcome = outcome


async def _with_progress(events: AsyncIterable[Any], extras: ResponseExtras | None) -> AsyncIterator[Any]:
    """Yield `events`, and before the first of them a chunk for each step of the strategy, if there is one."""
    iterator = aiter(events)
    if extras and (run := extras.run):
        first = asyncio.ensure_future(anext(iterator, ""))
        try:
            await run.progress(first, PROGRESS_INTERVAL_S)
            while not first.done():
                yield extras.progress(run)
                await run.progress(first, PROGRESS_INTERVAL_S)
            if first.result():
                yield first.result()
        finally:
            first.cancel()  # if the client has gone
            await asyncio.gather(first, return_exceptions=True)
    async for event in iterator:
        yield event


def _outcome(error_event: str) -> str:
    """Return the outcome that an error in a stream stands for, as its code would in a response of its own."""
    try:
        code = int(json.loads(error_event.removeprefix("data: "))["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "failed"
    return "rejected" if 400 <= code < 500 else "failed"


def _header(event: str) -> dict[str, Any]:
    """Return the fields of a chunk that all chunks of the stream share."""
    chunk = json.loads(event.removeprefix("data: ") or "{}")
    return {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}


def _event(content: dict[str, Any]) -> str:
    return f"data: {_json(content)}\n\n"


def _with_fields(event: str, fields: dict[str, Any]) -> str:
    """Return the last event of a responses API stream with `fields` in its response, beside `usage`."""
    name, data = event.rstrip().split("\ndata: ", 1)
    content = json.loads(data)
    content["response"] |= fields
    return f"{name}\ndata: {_json(content)}\n\n"


def _json(content: Any) -> str:
    """Return JSON text; NaN and infinities, which are none, must have become null before."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
