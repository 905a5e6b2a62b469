"""Scripted branches generate a token at each turn of the event loop: a thread would be late by an unknown number."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from server.strategies import extraction


class AtOnce(Executor):
    """Calls a function when it is submitted."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **options))
        return future


@pytest.fixture(autouse=True)
def answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "_executor", AtOnce())
