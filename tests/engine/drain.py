"""What has to happen when a server that is answering is told to stop."""

import asyncio
import os
import signal
import time
from typing import Any

import psutil

from tests.engine.launch import Server
from tests.engine.support import CHAT

LONG: dict[str, Any] = {"model": "demo", "messages": CHAT, "temperature": 1, "max_tokens": 180}


async def stops_in_good_order(server: Server) -> None:
    """Streams and a strategy end as if nothing had happened, new requests are refused, readiness fails."""
    process = psutil.Process(server.pid)
    begun = [asyncio.Event() for _ in range(6)]
    replies = [_streamed(server, seed, event) for seed, event in enumerate(begun)]
    running = [asyncio.create_task(reply) for reply in (*replies, _voted(server))]
    await asyncio.gather(*(asyncio.wait_for(event.wait(), 60) for event in begun))
    async with server.async_http() as http:
        assert (await http.get("/health/ready")).status_code == 200
        os.kill(server.pid, signal.SIGTERM)
        deadline = time.monotonic() + 5
        while (await http.get("/health/ready")).status_code != 503:
            assert time.monotonic() < deadline, "ready, while it drains"
        assert not all(task.done() for task in running), "there was nothing to wait for"
        refused = await http.post("/v1/completions", json={"model": "demo", "prompt": "1"})
        assert refused.status_code == 503
        assert refused.json()["error"] | {"message": ""} == {
            "message": "",
            "type": "Service Unavailable",
            "param": None,
            "code": 503,
        }
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
        assert (await http.get("/health/live")).status_code == 200
        assert (await http.get("/metrics")).status_code == 200  # the last tokens are counted too
    await asyncio.gather(*running)
    assert process.wait(60) == 0


async def _streamed(server: Server, seed: int, begun: asyncio.Event) -> None:
    extra = {"ignore_eos": True, "em_inf": {"stats": "summary"}}
    stream = await server.async_client.chat.completions.create(stream=True, seed=seed, extra_body=extra, **LONG)
    reason, block = None, None
    async for chunk in stream:
        begun.set()
        reason = chunk.choices[0].finish_reason if chunk.choices else reason
        block = getattr(chunk, "em_inf", block)
    assert reason == "length"
    assert block is not None and (block[0]["tokens"], block[0]["missing"]) == (180, 0)


async def _voted(server: Server) -> None:
    """Its branches start one after another: most of them when the server is already draining."""
    extra = {"ignore_eos": True, "strategy": {"type": "self_consistency", "n": 12, "parallel": 1}}
    reply: Any = await server.async_client.chat.completions.create(
        seed=1, extra_body=extra, **LONG | {"max_tokens": 80}
    )
    assert (reply.strategy["completed"], reply.usage.completion_tokens) == (12, 960)
