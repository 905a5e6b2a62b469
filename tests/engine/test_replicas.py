"""Three servers behind a real HAProxy: under load one is killed, another gets SIGTERM, and every reply is right."""

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from harness.launch import together
from harness.ports import free_port
from tests.engine.drain import DRAIN, check_drain
from tests.engine.launch import API_KEY, HANG_LIMIT_S, ROOT, Server, serve

HAPROXY = shutil.which("haproxy", path=Path(sys.executable).parent) or shutil.which("haproxy")
QUESTIONS = [f"{a}+{b}*3-{a}" for a in range(10, 14) for b in range(21, 27)]

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not HAPROXY, reason="no haproxy: see scripts/test-tools.sh")]


@pytest.fixture(scope="module")
def replicas(v1: Server) -> Iterator[list[Server]]:
    """Run three servers: one to kill, whose responses carry a request id; one to drain; the shared one, which stays."""
    with together(serve(*DRAIN, "--enable-request-id-headers"), serve(*DRAIN)) as servers:
        yield [*servers, v1]


@pytest.fixture(scope="module")
def balancer(replicas: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    addresses = {f"REPLICA_{i}": server.url.removeprefix("http://") for i, server in enumerate(replicas, 1)}
    with (tmp_path_factory.mktemp("haproxy") / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(HAPROXY), "-db", "-f", str(ROOT / "deploy" / "haproxy" / "haproxy.cfg")],
            env=os.environ | addresses | {"LISTEN": address},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        replicas[-1].until(lambda: _status(f"http://{address}/health/ready") == 200)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(HANG_LIMIT_S)


def _status(url: str) -> int:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, timeout=5).status_code
    return 0


@dataclass
class Streams:
    """The streams of one replica, as the client sees them."""

    open: set[object] = field(default_factory=set)
    chunks: int = 0  # that have come from the replica

    async def quiet(self) -> None:
        """Wait until the client has read all that a halted replica sent: no chunk comes in 20 turns of its loop."""
        turns, chunks = 0, self.chunks
        while turns < 20:
            await asyncio.sleep(0.05)
            turns, chunks = (turns + 1 if self.chunks == chunks else 0), self.chunks


async def ask(client: openai.AsyncOpenAI, question: str, stream: bool, on_first: Streams) -> str:
    """Return a greedy reply, which is the same from every replica; `on_first` follows the first replica's streams.

    Raises:
        openai.APIError, httpx.TransportError: if the reply did not come or is incomplete.
    """
    settings: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    messages: list[Any] = [{"role": "user", "content": question}]
    if not stream:
        reply = await client.chat.completions.create(messages=messages, **settings)
        return reply.choices[0].message.content or ""
    text, ended = "", False
    chunks = await client.chat.completions.create(messages=messages, stream=True, **settings)
    if "x-request-id" in chunks.response.headers:
        on_first.open.add(chunks)
    try:
        async for chunk in chunks:
            on_first.chunks += chunks in on_first.open
            text += chunk.choices[0].delta.content or ""
            ended = ended or chunk.choices[0].finish_reason == "length"
    finally:
        on_first.open.discard(chunks)
    if not ended:
        raise httpx.RemoteProtocolError("the stream ended early")
    return text


async def load(url: str, disturb: Callable[[Streams], Awaitable[None]]) -> tuple[list[tuple[str, str]], int, int]:
    """Send the questions in turn, twelve requests at a time, every other one streamed.

    After as many replies as there are questions, `disturb` is called with the first replica's streams. The load goes on
    until as many replies again have come after the call.

    Returns:
        The questions with their replies; how many streams and how many other requests the client had to send again.
    """
    numbers, replies, retries = itertools.count(), [], {True: 0, False: 0}
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0, timeout=HANG_LIMIT_S)
    disturbed, on_first = asyncio.Event(), Streams()

    async def ask_many() -> None:
        left = len(QUESTIONS) // 12
        while left:
            number = next(numbers)
            question, stream = QUESTIONS[number % len(QUESTIONS)], number % 2 == 0
            while True:
                with contextlib.suppress(openai.APIError, httpx.TransportError):
                    replies.append((question, await ask(client, question, stream, on_first)))
                    break
                retries[stream] += 1
                assert sum(retries.values()) < 40, "requests fail repeatedly"
            left -= disturbed.is_set()

    async def disturb_midway() -> None:
        while len(replies) < len(QUESTIONS):
            await asyncio.sleep(0.01)
        await disturb(on_first)
        disturbed.set()

    async with client:
        await asyncio.gather(disturb_midway(), *(ask_many() for _ in range(12)))
    return replies, retries[True], retries[False]


def test_a_replica_that_is_killed_and_one_that_drains_lose_no_request(replicas: list[Server], balancer: str) -> None:
    first, second, third = replicas
    expected = {question: reply.content for question, reply in zip(QUESTIONS, _replies(third), strict=True)}

    async def kill(streams: Streams) -> None:
        """Kill the first replica while it streams: halt it, and see whether a stream is still open at the client."""
        async with asyncio.timeout(HANG_LIMIT_S):
            while True:
                while not streams.open:
                    await asyncio.sleep(0.01)
                os.killpg(first.pid, signal.SIGSTOP)
                await streams.quiet()
                if streams.open:
                    break
                os.killpg(first.pid, signal.SIGCONT)
        os.killpg(first.pid, signal.SIGKILL)

    replies, streams, others = asyncio.run(load(balancer, kill))
    assert all(expected[question] == reply for question, reply in replies)
    # Only those that the killed replica had begun: its share of the twelve, and a few. HAProxy does not send them on,
    # as any of them may be what ended the replica; it sends those on whose connection failed.
    assert 0 < streams <= 6 and others <= 6

    replies, streams, others = asyncio.run(load(balancer, lambda _: check_drain(second)))
    assert all(expected[question] == reply for question, reply in replies)
    assert (streams, others) == (0, 0)  # no client noticed


def _replies(server: Server) -> list[Any]:
    """Return the replies to all questions, asked one by one."""
    client = server.client
    return [
        client.chat.completions.create(
            model="demo",
            temperature=0,
            max_tokens=60,
            messages=[{"role": "user", "content": question}],
            extra_body={"ignore_eos": True},
        )
        .choices[0]
        .message
        for question in QUESTIONS
    ]
