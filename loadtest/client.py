"""One call: a chat completion asked for over HTTP, timed as its bytes come. Knows nothing of arms or loads.

httpx, with a client for each connection in use: one pool of thousands would search all of them for every request.
"""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

from loadtest.records import Call
from loadtest.scenario import Limits

CONNECT = 30.0  # seconds
IDLE = 4.0  # seconds; uvicorn, and vLLM with it, closes a connection that is idle for 5


def api_root(base_url: str) -> str:
    """The server's address, with or without `/v1` and slashes at its end, as the address that has it."""
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/") + "/v1"


class Client:
    """Calls to one server. Connections are kept alive and used again."""

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

    async def call(self, body: dict[str, Any], began: float) -> Call:
        """Ask, and follow the reply to its end or its breaking off. Raises nothing that a server can cause.

        Args:
            body: of the request.
            began: when the stage began, on `time.monotonic`'s clock.
        """
        call = Call(seed=body.get("seed", 0), sent=time.monotonic() - began)
        connection = self._idle.pop() if self._idle else self._connection()
        try:
            async with asyncio.timeout(self.limits.request_s):
                await self._exchange(connection, body, call, began)
        except TimeoutError:
            call.error = f"timeout: no end after {self.limits.request_s:g} s"
        except httpx.ReadTimeout:
            call.error = f"stalled: no byte for {self.limits.stall_s:g} s"
        except httpx.HTTPError as error:
            call.error = f"connection: {type(error).__name__} {error}".rstrip()
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            call.error = f"unreadable: {type(error).__name__} {error}"
        finally:
            self._idle.append(connection)
        call.last = time.monotonic() - began
        _judge(call)
        return call

    async def get(self, path: str) -> httpx.Response | None:
        """What else the server says, from its root; None where it does not."""
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
            timeout=httpx.Timeout(CONNECT, read=self.limits.stall_s, pool=None),
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=IDLE),
            verify=self._ssl,
            trust_env=False,  # through a proxy, the proxy would be measured
        )
        self._all.append(connection)
        return connection

    async def _exchange(self, connection: httpx.AsyncClient, body: dict[str, Any], call: Call, began: float) -> None:
        async with connection.stream("POST", f"{self.root}/chat/completions", json=body) as response:
            if response.status_code != 200:
                call.error = f"HTTP {response.status_code}: {_message(await response.aread())}"
            elif body.get("stream"):
                await _read_stream(response, call, began)
            else:
                reply = json.loads(await response.aread())
                _take(reply, call)
                choice = reply["choices"][0]
                call.text = choice["message"].get("content") or ""
                call.finish_reason = choice["finish_reason"]
                tokens = (choice.get("logprobs") or {}).get("content") or ()
                call.top_logprobs = [[each["logprob"] for each in token["top_logprobs"]] for token in tokens]


async def _read_stream(response: httpx.Response, call: Call, began: float) -> None:
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
                call.error = f"error in the stream: {_message(data)}"
                return
            _take(event, call)
            for choice in event["choices"][:1]:
                call.finish_reason = choice.get("finish_reason") or call.finish_reason
                delta = choice.get("delta") or {}
                content = delta.get("content")
                if not content and not (delta.get("reasoning_content") or delta.get("reasoning")):
                    continue
                now = time.monotonic() - began
                parts.append(content or "")
                call.chunks += 1
                if previous is None:
                    call.first = now
                else:
                    call.gaps.append(round(now - previous, 5))
                previous = now
    finally:
        call.text = "".join(parts)
    if not done:
        call.error = "broke off: the stream ended without [DONE]"


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The `data` of server-sent events; OpenAI's have one line each."""
    rest = b""
    async for received in response.aiter_raw():
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _take(event: dict[str, Any], call: Call) -> None:
    """What a reply, or a chunk of it, says beside its text."""
    if usage := event.get("usage"):
        call.prompt_tokens, call.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    if statistics := event.get("em_inf"):
        call.em_inf = {name: value for name, value in statistics[0].items() if not isinstance(value, list)}
    if strategy := event.get("strategy"):
        call.strategy = strategy


def _judge(call: Call) -> None:
    """Its status, and how many tokens of it were the reply's own."""
    if call.error is None and call.finish_reason is not None:
        call.status = "ok"
    else:
        call.status = "incomplete" if call.chunks else "failed"
        call.error = call.error or "no finish_reason: the reply has no end"
    if call.strategy is None and call.output_tokens is not None:
        call.delivered_tokens = call.output_tokens
    else:  # of several samples one was delivered: the engine streams a token or a few in a chunk
        call.delivered_tokens = (call.em_inf or {}).get("tokens") or call.chunks or None


def _message(body: bytes) -> str:
    """The server's own words, shortened."""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = body.decode(errors="replace")
    return " ".join(str(text).split())[:300]
