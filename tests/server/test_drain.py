"""Draining: requests in flight are waited for, new ones are refused, and the engine is shut down afterwards."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from server.drain import ENGINE_SHUTDOWN_S, Drain, drain_before_shutdown


def shut_down(drain: Drain, timeout: float | None, on_event_loop: bool = False) -> list[float | None]:
    """Shut an engine client down behind `drain`; return the timeouts that the engine's own shutdown got."""
    got: list[float | None] = []
    client: Any = SimpleNamespace(shutdown=lambda timeout=None: got.append(timeout))
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
        assert shut_down(drain, timeout=0.01) == [ENGINE_SHUTDOWN_S]
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
