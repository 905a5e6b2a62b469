"""The mock server in a thread of the test's process, so that a test can see what it received."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette

from loadtest.mock import Mock, Script


@dataclass
class Served:
    """A running mock server."""

    mock: Mock
    url: str


@contextlib.contextmanager
def serve(**script: Any) -> Iterator[Served]:
    """Serve a `Script` until the block ends."""
    mock = Mock(Script(**script))
    with serve_app(mock.app()) as url:
        yield Served(mock, url)


@contextlib.contextmanager
def serve_app(app: Starlette) -> Iterator[str]:
    """Serve an application until the block ends; yields its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
