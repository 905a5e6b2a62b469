"""Sends chat completion requests over HTTP and measures the replies as they arrive. Knows nothing of configs or loads.

Each connection in use is an httpx client: one pool of thousands of connections would search them all per request.
"""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx

from loadtest.addresses import api_root, why
from loadtest.measurements import MeasuredRequest
from loadtest.replies import StreamedReply, error_message, read_reply, set_status
from loadtest.scenario import Limits, ScenarioError

CONNECT_TIMEOUT_S = 30.0
KEEPALIVE_S = 4.0  # uvicorn, and so vLLM, closes a connection that is idle for 5 s
REST_S = 1.0  # for the end of a connection after the end of its reply
MAX_REPLY_BYTES = 256 << 20
MAX_ERROR_BYTES = 64 << 10  # of a response that is none of ours, or an error


class Client:
    """A client of one server that keeps its connections alive and reuses them; a context manager.

    Attributes:
        root: the address to which `/chat/completions` is added.
        server: the address to which `/metrics` is added.
    """

    def __init__(self, base_url: str, api_key: str | None, limits: Limits) -> None:
        """Prepare a client.

        Raises:
            ScenarioError: if the address or the key cannot be one.
        """
        self.root = api_root(base_url)
        self.server = self.root.removesuffix("/v1")
        self.limits = limits
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ScenarioError("--api-key: has a character that a header cannot have: a line break, or beyond ASCII")
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
        measured = MeasuredRequest(seed=body.get("seed"), sent=time.monotonic() - began)
        connection = self._idle.pop() if self._idle else self._connection()
        try:
            async with asyncio.timeout(self.limits.request_s):
                await self._exchange(connection, body, measured, began)
        except TimeoutError:
            measured.error = f"timeout: no end after {self.limits.request_s:g} s"
        except httpx.ReadTimeout:
            measured.error = f"stalled: no byte for {self.limits.stall_s:g} s"
        except (httpx.HTTPError, httpx.StreamError) as error:
            measured.error = f"connection: {type(error).__name__} {error}".rstrip()
        except ValueError as error:
            measured.error = f"unreadable: {error}"
        finally:
            self._idle.append(connection)
        measured.last = measured.last or time.monotonic() - began
        set_status(measured)
        return measured

    async def get(self, url: str) -> bytes:
        """Return the body at an address.

        Raises:
            ScenarioError: if nothing answers with status 200; names the address and the reason.
        """
        connection = self._idle.pop() if self._idle else self._connection()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S + self.limits.stall_s):
                async with connection.stream("GET", url) as response:
                    if response.status_code == 200:
                        return b"".join([piece async for piece in _received(response, MAX_REPLY_BYTES)])
                    problem = f": {await _refusal(response)}"
        except (httpx.HTTPError, httpx.StreamError, TimeoutError) as error:
            problem = f" does not answer: {why(error, url)}"
        except ValueError as error:
            problem = f": {error}"
        finally:
            self._idle.append(connection)
        raise ScenarioError(url + problem)

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
                measured.error = await _refusal(response)
            elif body.get("stream"):
                await _read_stream(response, measured, began)
            else:
                read_reply(b"".join([piece async for piece in _received(response, MAX_REPLY_BYTES)]), measured)


async def _read_stream(response: httpx.Response, measured: MeasuredRequest, began: float) -> None:
    reply = StreamedReply(measured)
    pieces = _received(response, MAX_REPLY_BYTES)
    try:
        async for piece in pieces:
            reply.receive(piece, time.monotonic() - began)
            if reply.done:
                break
        else:
            reply.end(time.monotonic() - began)
    finally:
        measured.text = "".join(reply.parts)
        measured.last = time.monotonic() - began
    if reply.done:
        await _read_rest(pieces)


async def _read_rest(pieces: AsyncIterator[bytes]) -> None:
    """Read to the end of the response: only then its connection can be used again."""
    with suppress(TimeoutError, httpx.HTTPError, ValueError):
        async with asyncio.timeout(REST_S):
            async for _ in pieces:
                pass


async def _received(response: httpx.Response, most: int) -> AsyncIterator[bytes]:
    """Yield a body's bytes as they arrive.

    Raises:
        ValueError: if there are more than `most`.
    """
    total = 0
    async for piece in response.aiter_bytes():
        total += len(piece)
        if total > most:
            raise ValueError(f"the response is larger than {most >> 10} KiB")
        yield piece


async def _refusal(response: httpx.Response) -> str:
    """Return the status of a response, and what its body or headers say about it."""
    if response.has_redirect_location:
        return f"HTTP {response.status_code}: moved to {error_message(response.headers['location'].encode())}"
    body = b""
    with suppress(ValueError, httpx.HTTPError):
        async for piece in _received(response, MAX_ERROR_BYTES):
            body += piece
    return f"HTTP {response.status_code}: {error_message(body)}".removesuffix(": ")
