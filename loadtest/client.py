"""Sends chat completion requests over HTTP and measures the replies as they arrive. Knows nothing of configs or loads.

Each connection in use is an httpx client: one pool of thousands of connections would search them all per request.
"""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

from loadtest.measurements import MeasuredRequest
from loadtest.scenario import Limits

CONNECT_TIMEOUT_S = 30.0
KEEPALIVE_S = 4.0  # uvicorn, and so vLLM, closes a connection that is idle for 5 s


def api_root(base_url: str) -> str:
    """Return the server's address ending in `/v1`, whether or not `base_url` ends in it or in a slash."""
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/") + "/v1"


class Client:
    """A client of one server that keeps its connections alive and reuses them; a context manager."""

    def __init__(self, base_url: str, api_key: str | None, limits: Limits) -> None:
        self.root = api_root(base_url)
        self.limits = limits
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._ssl = ssl.create_default_context()
        self._idle: list[httpx.AsyncClient] = []
        self._all: list[httpx.AsyncClient] = []

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.gather(*(connection.aclose() for connection in self._all))

    async def send(self, body: dict[str, Any], began: float) -> MeasuredRequest:
        """Send a request and read the reply until it ends or breaks off. Raises nothing that a server can cause.

        Args:
            body: the request's JSON.
            began: when the stage began, on the clock of `time.monotonic`.
        """
        measured = MeasuredRequest(seed=body.get("seed", 0), sent=time.monotonic() - began)
        connection = self._idle.pop() if self._idle else self._connection()
        try:
            async with asyncio.timeout(self.limits.request_s):
                await self._exchange(connection, body, measured, began)
        except TimeoutError:
            measured.error = f"timeout: no end after {self.limits.request_s:g} s"
        except httpx.ReadTimeout:
            measured.error = f"stalled: no byte for {self.limits.stall_s:g} s"
        except httpx.HTTPError as error:
            measured.error = f"connection: {type(error).__name__} {error}".rstrip()
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            measured.error = f"unreadable: {type(error).__name__} {error}"
        finally:
            self._idle.append(connection)
        measured.last = time.monotonic() - began
        _set_status(measured)
        return measured

    async def get(self, path: str) -> httpx.Response | None:
        """Return the response for a path from the server's root; None if there is none with status 200."""
        connection = self._idle.pop() if self._idle else self._connection()
        try:
            response = await connection.get(self.root.removesuffix("/v1") + path)
        except (httpx.HTTPError, httpx.InvalidURL):
            return None
        finally:
            self._idle.append(connection)
        return response if response.status_code == 200 else None

    def _connection(self) -> httpx.AsyncClient:
        connection = httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(CONNECT_TIMEOUT_S, read=self.limits.stall_s, pool=None),
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEPALIVE_S),
            verify=self._ssl,
            trust_env=False,  # through a proxy, the proxy would be measured
        )
        self._all.append(connection)
        return connection

    async def _exchange(
        self, connection: httpx.AsyncClient, body: dict[str, Any], measured: MeasuredRequest, began: float
    ) -> None:
        async with connection.stream("POST", f"{self.root}/chat/completions", json=body) as response:
            if response.status_code != 200:
                measured.error = f"HTTP {response.status_code}: {_error_message(await response.aread())}"
            elif body.get("stream"):
                await _read_stream(response, measured, began)
            else:
                reply = json.loads(await response.aread())
                _read_metadata(reply, measured)
                choice = reply["choices"][0]
                measured.text = choice["message"].get("content") or ""
                measured.finish_reason = choice["finish_reason"]
                tokens = (choice.get("logprobs") or {}).get("content") or ()
                measured.top_logprobs = [[each["logprob"] for each in token["top_logprobs"]] for token in tokens]


async def _read_stream(response: httpx.Response, measured: MeasuredRequest, began: float) -> None:
    previous: float | None = None
    parts: list[str] = []
    done = False
    try:
        async for data in _events(response):
            if data == b"[DONE]":
                done = True
                continue
            event = json.loads(data)
            if "error" in event:
                measured.error = f"error in the stream: {_error_message(data)}"
                return
            _read_metadata(event, measured)
            for choice in event["choices"][:1]:
                measured.finish_reason = choice.get("finish_reason") or measured.finish_reason
                delta = choice.get("delta") or {}
                content = delta.get("content")
                if not content and not (delta.get("reasoning_content") or delta.get("reasoning")):
                    continue
                now = time.monotonic() - began
                parts.append(content or "")
                measured.chunks += 1
                if previous is None:
                    measured.first = now
                else:
                    measured.gaps.append(round(now - previous, 5))
                previous = now
    finally:
        measured.text = "".join(parts)
    if not done:
        measured.error = "broke off: the stream ended without [DONE]"


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the `data` of server-sent events; OpenAI's have one line each."""
    unfinished = b""
    async for received in response.aiter_raw():
        *lines, unfinished = (unfinished + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _read_metadata(event: dict[str, Any], measured: MeasuredRequest) -> None:
    """Take usage, stats and strategy from a reply, or from a chunk of it."""
    if usage := event.get("usage"):
        measured.prompt_tokens, measured.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    if summaries := event.get("em_inf"):
        measured.em_inf = {name: value for name, value in summaries[0].items() if not isinstance(value, list)}
    if strategy := event.get("strategy"):
        measured.strategy = strategy


def _set_status(measured: MeasuredRequest) -> None:
    """Set the status, and the number of tokens of the reply itself."""
    if measured.error is None and measured.finish_reason is not None:
        measured.status = "ok"
    else:
        measured.status = "incomplete" if measured.chunks else "failed"
        measured.error = measured.error or "no finish_reason: the reply has no end"
    if measured.strategy is None and measured.output_tokens is not None:
        measured.delivered_tokens = measured.output_tokens
    else:  # one of several samples was delivered; without stats, count chunks: each has a token or a few
        measured.delivered_tokens = (measured.em_inf or {}).get("tokens") or measured.chunks or None


def _error_message(body: bytes) -> str:
    """Return the server's error message, shortened."""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = body.decode(errors="replace")
    return " ".join(str(text).split())[:300]
