"""The probes: alive whatever the engine does, ready only if requests would be answered."""

import asyncio
from types import SimpleNamespace
from typing import Any

from starlette.responses import Response

from server.drain import Drain
from server.health import live, ready


def probe(engine_client: Any, draining: bool = False) -> Response:
    drain = Drain()
    if draining:
        drain.run(timeout_s=0)
    state = SimpleNamespace(drain=drain, engine_client=engine_client)
    request: Any = SimpleNamespace(app=SimpleNamespace(state=state))
    return asyncio.run(ready(request))


class Engine:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def check_health(self) -> None:
        if self.error:
            raise self.error


def test_a_server_is_live_whatever_its_engine_does() -> None:
    assert asyncio.run(live()).status_code == 200


def test_a_server_is_ready_with_a_healthy_engine_or_without_one() -> None:
    assert [probe(engine).status_code for engine in (Engine(), None)] == [200, 200]


def test_a_draining_server_is_not_ready() -> None:
    response = probe(Engine(), draining=True)
    assert (response.status_code, response.body) == (503, b"draining")


def test_a_server_with_a_dead_engine_is_not_ready_and_says_why() -> None:
    response = probe(Engine(RuntimeError("the engine is dead")))
    assert (response.status_code, response.body) == (503, b"RuntimeError: the engine is dead")
