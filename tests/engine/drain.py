"""What must happen when a busy server gets SIGTERM."""

import asyncio
import os
import signal
import time
from typing import Any

import psutil

from tests.engine.launch import HANG_LIMIT_S, Server
from tests.engine.support import CHAT

DRAIN = ("--shutdown-timeout", str(2 * HANG_LIMIT_S))  # seconds; flags of a server that `check_drain` may end
LONG: dict[str, Any] = {"model": "demo", "messages": CHAT, "temperature": 1, "max_tokens": 180}


async def check_drain(server: Server) -> None:
    """Send SIGTERM; check that the server finishes what it runs, refuses new requests with 503 and exits with 0."""
    process = psutil.Process(server.pid)
    running, engines = await _halted_midway(server)
    try:
        async with server.async_http() as http:
            assert (await http.get("/health/ready")).status_code == 200
            os.kill(server.pid, signal.SIGTERM)
            deadline = time.monotonic() + HANG_LIMIT_S
            while (await http.get("/health/ready")).status_code != 503:
                assert time.monotonic() < deadline, "still ready while it drains"
            assert not all(task.done() for task in running), "no request was running"
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
            assert (await http.get("/metrics")).status_code == 200  # Prometheus can still scrape the last tokens
    finally:
        for engine in engines:
            engine.resume()
    await asyncio.gather(*running)
    assert await asyncio.to_thread(process.wait, HANG_LIMIT_S) == 0


async def _halted_midway(server: Server) -> tuple[list[asyncio.Task[None]], list[psutil.Process]]:
    """Return requests that the server runs, and its engines, which are halted so that it still runs them at SIGTERM.

    On a slow machine the requests may end before this process sees that they have begun: then others are sent.
    """
    engines = [process for process in server.processes() if "EngineCore" in " ".join(process.cmdline())]
    while True:
        first_chunks = [asyncio.Event() for _ in range(6)]
        replies = [_stream(server, seed, event) for seed, event in enumerate(first_chunks)]
        running = [asyncio.create_task(reply) for reply in (*replies, _vote(server))]
        await asyncio.gather(*(asyncio.wait_for(event.wait(), HANG_LIMIT_S) for event in first_chunks))
        for engine in engines:
            engine.suspend()
        if await asyncio.to_thread(server.metric, "em_inf_strategy_branches_running"):
            return running, engines
        for engine in engines:
            engine.resume()
        await asyncio.gather(*running)


async def _stream(server: Server, seed: int, first_chunk: asyncio.Event) -> None:
    extra = {"ignore_eos": True, "em_inf": {"stats": "summary"}}
    stream = await server.async_client.chat.completions.create(stream=True, seed=seed, extra_body=extra, **LONG)
    reason, summaries = None, None
    async for chunk in stream:
        first_chunk.set()
        reason = chunk.choices[0].finish_reason if chunk.choices else reason
        summaries = getattr(chunk, "em_inf", summaries)
    assert reason == "length"
    assert summaries is not None and (summaries[0]["tokens"], summaries[0]["missing"]) == (180, 0)


async def _vote(server: Server) -> None:
    """Ask for a strategy whose branches start one after another: most of them while the server drains."""
    extra = {"ignore_eos": True, "strategy": {"type": "self_consistency", "n": 12, "parallel": 1}}
    reply: Any = await server.async_client.chat.completions.create(
        seed=1, extra_body=extra, **LONG | {"max_tokens": 80}
    )
    assert (reply.strategy["completed"], reply.usage.completion_tokens) == (12, 960)
