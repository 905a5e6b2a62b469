"""Graceful shutdown: after SIGTERM, running requests are answered to their last byte and new ones are refused.

What has not ended in time is cut off with an error that says so. vLLM's own drain keeps accepting HTTP requests, which
its engine then aborts, and lets requests hang that have no engine request at that moment or are left at the end.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import cut_off_event, shutting_down

ENGINE_SHUTDOWN_S = 5.0  # time left to the engine's processes if the drain has used up the timeout
LAST_WORD_S = 2.0  # of the timeout, kept for telling clients that they are cut off
CLOSE_S = 3  # how long the HTTP server waits for clients that do not read; uvicorn's own default is for ever

engine_died = threading.Event()  # set if this process's engine ended before it was told to


class Drain:
    """A count of the requests in flight on this API server, and whether new ones are accepted.

    One lock guards both, so that no request slips in between the last look at the count and the shutdown.
    """

    def __init__(self) -> None:
        self.draining = False
        self.cut = False
        self.in_flight = 0
        self.tasks: set[asyncio.Future[None]] = set()
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def admit(self) -> Iterator[bool]:
        """Count a request as in flight inside the context; yield False, uncounted, if the server is draining."""
        with self.changed:
            admitted = not self.draining
            self.in_flight += admitted
        try:
            yield admitted
        finally:
            with self.changed:
                self.in_flight -= admitted
                self.changed.notify_all()

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve an admitted request with `app`, until it is answered or cut off."""
        reply = Reply(send)
        task = asyncio.ensure_future(app(scope, receive, reply.send))
        with self.changed:
            self.tasks.add(task)
        try:
            await task
        except asyncio.CancelledError:
            if not self.cut:
                raise
        finally:
            with self.changed:
                self.tasks.discard(task)
        if self.cut and not reply.complete:
            with contextlib.suppress(TimeoutError):  # a client that does not read
                await asyncio.wait_for(reply.cut_off(scope, receive), LAST_WORD_S / 2)

    def refuse(self) -> None:
        """Refuse new requests from now on."""
        with self.changed:
            self.draining = True

    def run(self, timeout_s: float) -> None:
        """Refuse new requests, wait for those in flight, and cut off what is left near the end of `timeout_s`.

        Blocks the calling thread, for LAST_WORD_S at least if there is something to cut off.
        """
        with self.changed:
            self.draining = True
            self.changed.wait_for(lambda: self.in_flight == 0, max(timeout_s - LAST_WORD_S, 0))
            if self.in_flight == 0:
                return
            self.cut = True
            for task in self.tasks:
                task.get_loop().call_soon_threadsafe(task.cancel)
            self.changed.wait_for(lambda: self.in_flight == 0, LAST_WORD_S)


class Reply:
    """The response to one request, as far as it has been sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self.streams = self.complete = False

    async def send(self, message: Message) -> None:
        """Send a message of the response."""
        if message["type"] == "http.response.start":
            self.started = True
            self.streams = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
        else:
            self.complete = not message.get("more_body", False)
        await self._send(message)

    async def cut_off(self, scope: Scope, receive: Receive) -> None:
        """End the response: with an error in the stream, with 503 if nothing was sent yet."""
        if not self.started:
            await shutting_down()(scope, receive, self._send)
        elif self.streams:
            await self._send({"type": "http.response.body", "body": cut_off_event(), "more_body": False})


def drain_before_shutdown(engine_client: Any, drain: Drain) -> None:
    """Make `engine_client.shutdown` drain this server first: vLLM calls it on SIGTERM, with --shutdown-timeout."""
    shutdown = engine_client.shutdown

    def drain_and_shut_down(timeout: float | None = None) -> None:
        deadline = time.monotonic() + (timeout or 0)
        if not drain.draining and engine_client.errored:
            engine_died.set()
        # vLLM calls this on the event loop if the start fails or the engine died: waiting there would block the
        # requests waited for.
        if _on_event_loop():
            drain.refuse()
        else:
            drain.run(timeout or 0)
        shutdown(timeout=max(deadline - time.monotonic(), ENGINE_SHUTDOWN_S) if timeout else timeout)

    engine_client.shutdown = drain_and_shut_down


def bound_close(state: Any) -> None:
    """Let the HTTP server close connections whose clients do not read, so that they do not keep the process."""
    if server := getattr(state, "server", None):  # vLLM sets it after the routes' state
        server.config.timeout_graceful_shutdown = CLOSE_S


def _on_event_loop() -> bool:
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop() is not None
    return False
