"""Ports for servers that a test starts."""

import contextlib
import socket


def free_port(together: int = 1) -> int:
    """A port of this machine that is free, with those after it."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            probes = [stack.enter_context(socket.socket()) for _ in range(together)]
            probes[0].bind(("127.0.0.1", 0))
            port: int = probes[0].getsockname()[1]
            for offset, probe in enumerate(probes[1:], 1):
                probe.bind(("127.0.0.1", port + offset))
            return port
