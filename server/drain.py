"""Ending in good order: when the server is told to stop, requests in flight are answered and new ones are refused.

vLLM's own drain goes on accepting HTTP requests, which its engine then aborts, and cuts off what has no engine request
at that moment: a strategy between two of its branches, a reply that waits for its statistics.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

TEARDOWN = 5.0  # seconds that the engine's processes have to end, when the drain has used up its time


class Drain:
    """The requests in flight on this API server, and whether it takes new ones; one lock: none slips through."""

    def __init__(self) -> None:
        self.draining = False
        self.requests = 0
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def request(self) -> Iterator[bool]:
        """A request from its first byte to its reply's last; yields whether it may be answered."""
        with self.changed:
            admitted = not self.draining
            self.requests += admitted
        try:
            yield admitted
        finally:
            with self.changed:
                self.requests -= admitted
                self.changed.notify_all()

    def run(self, timeout: float) -> None:
        """Refuse new requests, and wait at most `timeout` seconds for those in flight."""
        with self.changed:
            self.draining = True
            self.changed.wait_for(lambda: self.requests == 0, timeout)


def drain_first(engine_client: Any, drain: Drain) -> None:
    """Make vLLM's `engine_client.shutdown`, called on SIGTERM with --shutdown-timeout, drain this server first."""
    shutdown = engine_client.shutdown

    def drained(timeout: float | None = None) -> None:
        deadline = time.monotonic() + (timeout or 0)
        # On the event loop, as when the start fails, a wait would hold up what it waits for.
        drain.run(0 if _on_event_loop() else timeout or 0)
        shutdown(timeout=max(deadline - time.monotonic(), TEARDOWN) if timeout else timeout)

    engine_client.shutdown = drained


def refusal() -> Response:
    """503 for a request that comes too late; `Connection: close` sends the client's next one elsewhere."""
    status = HTTPStatus.SERVICE_UNAVAILABLE
    message = "this server is shutting down: send the request again"
    content = {"message": message, "type": status.phrase, "param": None, "code": status.value}
    return JSONResponse({"error": content}, status.value, headers={"Retry-After": "1", "Connection": "close"})


async def live() -> Response:
    """Whether the process answers, whatever its engine does: a busy or draining server is not to be restarted."""
    return Response()


async def ready(raw_request: Request) -> Response:
    """Whether to send requests here: not to a server that drains, or whose engine is dead."""
    state: Any = raw_request.app.state
    if state.drain.draining:
        return Response("draining", HTTPStatus.SERVICE_UNAVAILABLE)
    try:
        if state.engine_client is not None:
            await state.engine_client.check_health()
    except Exception as error:  # of vLLM's: its way to say so
        return Response(f"{type(error).__name__}: {error}", HTTPStatus.SERVICE_UNAVAILABLE)
    return Response()


def _on_event_loop() -> bool:
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop() is not None
    return False
