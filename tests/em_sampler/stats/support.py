"""What the tests of this package share: return addresses, tokens with known stats, and an API server's end."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from em_sampler.stats.aggregator import ReturnAddress
from em_sampler.stats.transport import listen
from em_sampler.stats.wire import Message, StructuredArray, unpack

ONE, OTHER = "0123456789abcdef" * 2 + ".0", "f" * 32 + ".1"  # socket names
KEY = "a key for tests, 32 characters or more"
TokenStats = tuple[float, float, float, int]  # entropy before and after, varentropy, steps


def return_address(
    request_number: int, per_token: bool = False, choice: int = 0, socket_name: str = ONE
) -> ReturnAddress:
    return ReturnAddress(socket_name, request_number, choice, per_token)


def at(position: int) -> TokenStats:
    """Stats that only this position has."""
    return 1.0 + position, 0.5, position / 4, position


def read(tokens: StructuredArray) -> list[tuple[Any, ...]]:
    """(request number, choice, position, before, after, varentropy, steps) of each token."""
    return [(number, choice, position, *stats) for number, choice, position, *stats in tokens.tolist()]


class Server:
    """An API server's end."""

    def __init__(self, address: Path | str, socket_name: str) -> None:
        self.socket_name = socket_name
        address = address if isinstance(address, str) else f"ipc://{address}"
        self.socket = listen(address, socket_name)

    def receive(self) -> tuple[StructuredArray, StructuredArray, np.void]:
        """Wait for a message; (tokens, totals, header)."""
        return self.message()[:3]

    def message(self) -> Message:
        """Wait for a message."""
        assert self.socket.poll(10_000), "nothing came"
        return unpack(self.socket.recv(), self.socket_name)


@contextlib.contextmanager
def server(address: Path | str, socket_name: str = ONE) -> Iterator[Server]:
    """Listen at an address, or in a folder."""
    opened = Server(address, socket_name)
    try:
        yield opened
    finally:
        opened.socket.close(linger=0)
