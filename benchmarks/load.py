"""Load on an OpenAI-compatible server: one turn of requests, so many at a time; output tokens per second."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import httpx


def client(url: str) -> httpx.AsyncClient:
    """A client that keeps a connection for each request that runs, httpx would keep 20, and drops it before the server
    does: vLLM closes one that was idle for 5 seconds, which is httpx's own limit and ends a request now and then."""
    return httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(keepalive_expiry=1))


async def turn(
    http: httpx.AsyncClient, bodies: Sequence[dict[str, Any]], concurrency: int
) -> tuple[float, list[dict[str, Any]]]:
    """Output tokens per second of /v1/completions over all `bodies`, and the answers in their order."""
    slots = asyncio.Semaphore(concurrency)

    async def one(body: dict[str, Any]) -> dict[str, Any]:
        async with slots:
            answer: dict[str, Any] = (await http.post("/v1/completions", json=body)).raise_for_status().json()
        return answer

    start = time.perf_counter()
    answers = await asyncio.gather(*(one(body) for body in bodies))
    seconds = time.perf_counter() - start
    return sum(answer["usage"]["completion_tokens"] for answer in answers) / seconds, answers
