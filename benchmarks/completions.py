"""A client that sends many requests to an OpenAI-compatible server, with a limit on how many run at a time."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx

T = TypeVar("T")


def open_client(url: str) -> httpx.AsyncClient:
    """Return a client that keeps a connection for every running request (httpx would keep 20) for at most a second.

    vLLM closes a connection that was idle for 5 seconds. httpx's own limit is the same 5 seconds: now and then it would
    send a request on a connection that the server is closing, and the request would fail.
    """
    return httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(keepalive_expiry=1))


async def post_all(
    client: httpx.AsyncClient,
    path: str,
    bodies: Sequence[dict[str, Any]],
    concurrency: int,
    read: Callable[[httpx.Response], T],
) -> list[T]:
    """POST every body to `path`, `concurrency` at a time; return what `read` makes of each response, in their order.

    Raises:
        httpx.HTTPStatusError: if a response has an error status.
    """
    limit = asyncio.Semaphore(concurrency)

    async def post(body: dict[str, Any]) -> T:
        async with limit:
            return read((await client.post(path, json=body)).raise_for_status())

    return await asyncio.gather(*(post(body) for body in bodies))


async def measure_rate(
    client: httpx.AsyncClient, bodies: Sequence[dict[str, Any]], concurrency: int
) -> tuple[float, list[dict[str, Any]]]:
    """Return output tokens per second of /v1/completions over all `bodies`, and the responses in their order."""
    start = time.perf_counter()
    responses = await post_all(client, "/v1/completions", bodies, concurrency, _json)
    seconds = time.perf_counter() - start
    return sum(response["usage"]["completion_tokens"] for response in responses) / seconds, responses


def _json(response: httpx.Response) -> dict[str, Any]:
    parsed: dict[str, Any] = response.json()
    return parsed
