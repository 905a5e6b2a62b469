"""Three servers behind a real HAProxy: one is killed under load, another told to stop; nothing is lost."""

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from harness.launch import together
from harness.ports import free_port
from tests.engine.drain import stops_in_good_order
from tests.engine.launch import API_KEY, ROOT, Server, serve

HAPROXY = shutil.which("haproxy", path=Path(sys.executable).parent) or shutil.which("haproxy")
DRAIN = ("--shutdown-timeout", "60")
QUESTIONS = [f"{a}+{b}*3-{a}" for a in range(10, 14) for b in range(21, 27)]

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not HAPROXY, reason="no haproxy: see scripts/test-tools.sh")]


@pytest.fixture(scope="module")
def replicas(v1: Server) -> Iterator[list[Server]]:
    """The shared server comes last: it stays. The first one's replies are told apart by a header."""
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
        process.wait(30)


def _status(url: str) -> int:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, timeout=5).status_code
    return 0


async def ask(client: openai.AsyncOpenAI, question: str, stream: bool, on_first: set[object]) -> str:
    """A greedy reply, of the same tokens whichever replica gives it; in `on_first` while the first one streams it.

    Raises:
        openai.APIError, httpx.TransportError: where it did not come whole.
    """
    settings: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    messages: list[Any] = [{"role": "user", "content": question}]
    if not stream:
        reply = await client.chat.completions.create(messages=messages, **settings)
        return reply.choices[0].message.content or ""
    text, ended = "", False
    chunks = await client.chat.completions.create(messages=messages, stream=True, **settings)
    if "x-request-id" in chunks.response.headers:
        on_first.add(chunks)
    try:
        async for chunk in chunks:
            text += chunk.choices[0].delta.content or ""
            ended = ended or chunk.choices[0].finish_reason == "length"
    finally:
        on_first.discard(chunks)
    if not ended:
        raise httpx.RemoteProtocolError("the stream ended too soon")
    return text


async def load(url: str, midway: Callable[[set[object]], None]) -> tuple[list[tuple[str, str]], int, int]:
    """The questions in turn, every other request streamed, twelve at a time. `midway` is called after as many replies
    as there are questions, with the streams that the first replica is giving; the load goes on until as many have come
    after it.

    Returns the questions with their replies, and how many streams and other requests the client had to send again.
    """
    numbers, replies, again = itertools.count(), [], {True: 0, False: 0}
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0, timeout=120)
    acted, on_first = asyncio.Event(), set[object]()

    async def ask_on() -> None:
        left = len(QUESTIONS) // 12
        while left:
            number = next(numbers)
            question, stream = QUESTIONS[number % len(QUESTIONS)], number % 2 == 0
            while True:
                with contextlib.suppress(openai.APIError, httpx.TransportError):
                    replies.append((question, await ask(client, question, stream, on_first)))
                    break
                again[stream] += 1
                assert sum(again.values()) < 40, "the same request again and again"
            left -= acted.is_set()

    async def act() -> None:
        while len(replies) < len(QUESTIONS):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(midway, on_first)
        acted.set()

    async with client:
        await asyncio.gather(act(), *(ask_on() for _ in range(12)))
    return replies, again[True], again[False]


def test_a_replica_that_is_killed_and_one_that_drains_lose_no_request(replicas: list[Server], balancer: str) -> None:
    first, second, third = replicas
    expected = {question: reply.content for question, reply in zip(QUESTIONS, _alone(third), strict=True)}

    def kill(streams: set[object]) -> None:
        """In the middle of a stream: one that is open still when the client has read all that a halted replica sent."""
        for _ in range(30):
            os.killpg(first.pid, signal.SIGSTOP)
            time.sleep(1)
            if streams:
                break
            os.killpg(first.pid, signal.SIGCONT)
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGKILL)

    replies, streams, others = asyncio.run(load(balancer, kill))
    assert all(expected[question] == reply for question, reply in replies)
    assert others == 0  # the balancer sent them again
    assert 0 < streams <= 6  # those that the dead replica had begun: at most its share of the twelve, and a few

    replies, streams, others = asyncio.run(load(balancer, lambda _: asyncio.run(stops_in_good_order(second))))
    assert all(expected[question] == reply for question, reply in replies)
    assert (streams, others) == (0, 0)  # nobody noticed


def _alone(server: Server) -> list[Any]:
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
