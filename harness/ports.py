"""Free ports for servers that are about to start."""

import contextlib
import socket


def free_port(consecutive: int = 1) -> int:
    """Return a free port of 127.0.0.1, the first of `consecutive` free ones. Another process may still take it."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            sockets = [stack.enter_context(socket.socket()) for _ in range(consecutive)]
            sockets[0].bind(("127.0.0.1", 0))
            port: int = sockets[0].getsockname()[1]
            for offset, following in enumerate(sockets[1:], 1):
                following.bind(("127.0.0.1", port + offset))
            return port
