"""Graceful shutdown: after SIGTERM, running requests are answered to their last byte and new ones are refused.

vLLM's own drain keeps accepting HTTP requests, which its engine then aborts, and cuts off requests that have no engine
request at that moment: a strategy between two branches, a response that waits for its stats.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

ENGINE_SHUTDOWN_S = 5.0  # time left to the engine's processes if the drain has used up the timeout


class Drain:
    """A count of the requests in flight on this API server, and whether new ones are accepted.

    One lock guards both, so that no request slips in between the last look at the count and the shutdown.
    """

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
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

    def run(self, timeout_s: float) -> None:
        """Refuse new requests and wait at most `timeout_s` for those in flight. Blocks the calling thread."""
        with self.changed:
            self.draining = True
            self.changed.wait_for(lambda: self.in_flight == 0, timeout_s)


def drain_before_shutdown(engine_client: Any, drain: Drain) -> None:
    """Make `engine_client.shutdown` drain this server first: vLLM calls it on SIGTERM, with --shutdown-timeout."""
    shutdown = engine_client.shutdown

    def drain_and_shut_down(timeout: float | None = None) -> None:
        deadline = time.monotonic() + (timeout or 0)
        # vLLM calls this on the event loop if the start fails: waiting there would block the requests waited for.
        drain.run(0 if _on_event_loop() else timeout or 0)
        shutdown(timeout=max(deadline - time.monotonic(), ENGINE_SHUTDOWN_S) if timeout else timeout)

    engine_client.shutdown = drain_and_shut_down


def _on_event_loop() -> bool:
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop() is not None
    return False
