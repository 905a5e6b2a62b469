"""Strangers at the statistics socket: they speak ZMTP but have no key, and connect again whenever they are refused."""

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator

# ZMTP 3.0 without security: a greeting, a READY command of a PUSH socket, then frames (RFC 23 of ZeroMQ).
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type" + (4).to_bytes(4, "big") + b"PUSH"
HELLO = GREETING + bytes([4, len(READY)]) + READY
SMALL_MESSAGES = b"\x00\x01x" * 20_000
FRAME_BYTES = 8 << 20
FRAME_OF_A_MESSAGE_WITHOUT_END = b"\x03" + FRAME_BYTES.to_bytes(8, "big") + bytes(FRAME_BYTES)
MANY_FRAMES = 60  # half a GiB, if they are taken
TIMEOUT_S = 1.0
LIMIT_S = 60.0  # a server that reads on its event loop answers nobody before they stop


class Strangers:
    """Strangers that send while the block runs, for LIMIT_S at most.

    `taken`: the bytes that left; the kernel holds some of them.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.address = (host, int(port))
        self.stop = threading.Event()
        self.taken = self.connections = 0
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def flooding(self, number: int) -> Iterator[None]:
        """Send one message of 1 byte after the other, by `number` connections."""
        with self._running([itertools.repeat(SMALL_MESSAGES) for _ in range(number)]):
            yield

    @contextlib.contextmanager
    def never_ending(self) -> Iterator[None]:
        """Send one message of large frames that does not end, and keep the connection."""
        with self._running([itertools.repeat(FRAME_OF_A_MESSAGE_WITHOUT_END, MANY_FRAMES)]):
            yield

    @contextlib.contextmanager
    def _running(self, floods: list[Iterator[bytes]]) -> Iterator[None]:
        threads = [threading.Thread(target=self._send, args=(flood,)) for flood in floods]
        end = threading.Timer(LIMIT_S, self.stop.set)
        for thread in (*threads, end):
            thread.start()
        try:
            yield
        finally:
            end.cancel()
            self.stop.set()
            for thread in threads:
                thread.join()

    def _send(self, flood: Iterator[bytes]) -> None:
        while not self.stop.is_set():
            with contextlib.suppress(OSError), socket.create_connection(self.address, TIMEOUT_S) as connection:
                with self.lock:
                    self.connections += 1
                connection.sendall(HELLO)
                connection.recv(64)
                for data in flood:
                    connection.sendall(data)
                    with self.lock:
                        self.taken += len(data)
                    if self.stop.is_set():
                        return
                self.stop.wait()
            self.stop.wait(0.01)
