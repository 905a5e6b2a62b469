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

from starlette.responses import Response

from server.errors import error_response

ENGINE_SHUTDOWN_S = 5.0  # seconds that the engine's processes have to end, when the drain has used up its time


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


def drain_before_shutdown(engine_client: Any, drain: Drain) -> None:
    """Make vLLM's `engine_client.shutdown`, called on SIGTERM with --shutdown-timeout, drain this server first."""
    shutdown = engine_client.shutdown

    def drained(timeout: float | None = None) -> None:
        deadline = time.monotonic() + (timeout or 0)
        # On the event loop, as when the start fails, a wait would hold up what it waits for.
        drain.run(0 if _on_event_loop() else timeout or 0)
        shutdown(timeout=max(deadline - time.monotonic(), ENGINE_SHUTDOWN_S) if timeout else timeout)

    engine_client.shutdown = drained


def shutting_down_response() -> Response:
    """Make the 503 for a request that comes too late; `Connection: close` sends the client's next one elsewhere."""
    message = "this server is shutting down: send the request again"
    headers = {"Retry-After": "1", "Connection": "close"}
    return error_response(HTTPStatus.SERVICE_UNAVAILABLE, message, None, headers)


def _on_event_loop() -> bool:
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop() is not None
    return False
