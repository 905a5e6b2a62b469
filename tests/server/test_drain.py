"""Draining: requests in flight are waited for, new ones are refused, and the engine is shut down afterwards."""

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from server import drain as drain_module
from server.drain import ENGINE_SHUTDOWN_S, LAST_WORD_S, Drain, drain_before_shutdown, engine_died


def shut_down(drain: Drain, timeout: float | None, on_event_loop: bool = False) -> list[float | None]:
    """Shut an engine client down behind `drain`; return the timeouts that the engine's own shutdown got."""
    got: list[float | None] = []
    client: Any = SimpleNamespace(errored=False, shutdown=lambda timeout=None: got.append(timeout))
    drain_before_shutdown(client, drain)

    async def call() -> None:
        client.shutdown(timeout=timeout)

    asyncio.run(call()) if on_event_loop else client.shutdown(timeout=timeout)
    return got


def test_requests_are_counted_until_they_end_and_refused_after_the_drain() -> None:
    drain = Drain()
    with drain.admit() as first, drain.admit() as second:
        assert (first, second, drain.in_flight) == (True, True, 2)
    assert drain.in_flight == 0
    drain.run(timeout_s=0)
    with drain.admit() as late:
        assert (late, drain.in_flight) == (False, 0)
    assert drain.in_flight == 0


def test_a_request_that_raises_is_no_longer_in_flight() -> None:
    drain = Drain()
    with pytest.raises(ZeroDivisionError), drain.admit():
        raise ZeroDivisionError
    assert drain.in_flight == 0


def test_the_drain_waits_for_requests_in_flight() -> None:
    drain = Drain()
    stopping = threading.Thread(target=shut_down, args=(drain, 60))
    with drain.admit():
        stopping.start()
        stopping.join(0.2)
        assert stopping.is_alive()
    stopping.join(60)
    assert not stopping.is_alive()


def test_the_drain_ends_at_its_timeout_and_leaves_the_engine_time_to_end() -> None:
    drain = Drain()
    with drain.admit():
        assert shut_down(drain, timeout=LAST_WORD_S + 0.01) == [ENGINE_SHUTDOWN_S]
    assert shut_down(drain, timeout=None) == [None]
    assert shut_down(drain, timeout=0) == [0]


def test_on_the_event_loop_the_drain_does_not_wait() -> None:
    """There, waiting for requests would keep them from ending: without this, the test would take ten minutes."""
    drain = Drain()
    with drain.admit():
        (timeout,) = shut_down(drain, timeout=600, on_event_loop=True)
    assert drain.draining
    assert timeout is not None
    assert timeout > 500


async def cut_off(drain: Drain, app: Any, read: Any = None) -> list[Any]:
    """Serve a request with `app` and cut it off in the middle; return the messages that its client got."""
    got: list[Any] = []
    running = asyncio.Event()

    async def send(message: Any) -> None:
        if read:
            await read()
        got.append(message)

    async def receive() -> Any:
        return await asyncio.Event().wait()

    async def run(scope: Any, receive: Any, send: Any) -> None:
        running.set()
        await app(send)
        await asyncio.Event().wait()  # for ever

    async def request() -> None:
        with drain.admit():
            await drain.serve(run, {"type": "http"}, receive, send)

    task = asyncio.create_task(request())
    await running.wait()
    await asyncio.sleep(0)
    await asyncio.to_thread(drain.run, 0)
    await asyncio.wait_for(task, 60)
    assert drain.in_flight == 0
    return got


def test_what_is_left_at_the_timeout_is_cut_off_with_503() -> None:
    async def app(send: Any) -> None: ...

    start, body = asyncio.run(cut_off(Drain(), app))
    assert start["status"] == 503
    assert b"shutting down" in body["body"]


def test_a_stream_is_cut_off_with_an_error_and_done() -> None:
    async def app(send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})

    _, _, end = asyncio.run(cut_off(Drain(), app))
    error, done = end["body"].decode().strip().split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
    assert (done, end["more_body"]) == ("data: [DONE]", False)


def test_a_reply_that_was_sent_is_not_cut_off() -> None:
    async def app(send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"all"})

    assert [message["type"] for message in asyncio.run(cut_off(Drain(), app))] == [
        "http.response.start",
        "http.response.body",
    ]


def test_a_client_that_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_module, "LAST_WORD_S", 0.2)

    async def app(send: Any) -> None: ...

    assert asyncio.run(cut_off(Drain(), app, read=asyncio.Event().wait)) == []


def test_an_error_of_a_request_passes_through() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(Drain().serve(app, {"type": "http"}, None, None))  # type: ignore[arg-type]


@pytest.mark.parametrize("died", [False, True])
def test_an_engine_that_ended_before_it_was_told_to_is_noted(died: bool) -> None:
    client: Any = SimpleNamespace(errored=died, shutdown=lambda timeout=None: None)
    drain_before_shutdown(client, Drain())
    try:
        client.shutdown()
        client.errored = True  # once it is shut down
        client.shutdown()
        assert engine_died.is_set() is died
    finally:
        engine_died.clear()
