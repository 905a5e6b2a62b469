"""Where API servers listen for statistics and workers send them: sockets in a folder, or TCP between machines.

A channel is the name of one API server's socket: a secret, which every message repeats, and the server's number.
"""

import contextlib
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import zmq

SOCKET_DIR_ENV = "EM_INF_TELEMETRY_DIR"  # the folder of the sockets, made by em-serve for its owner alone
ADDRESS_ENV = "EM_INF_STATISTICS_ADDRESS"  # instead of it, host:port; API server i listens on port + i
SOCKET_NAME = re.compile("[0-9a-f]{32}[.](0|[1-9][0-9]{0,3})")
MAX_TMPDIR_BYTES = 50  # bytes; a unix socket's path has at most 107, of which a channel and the folder's name take 54
MAX_MESSAGE_BYTES = 2**26  # bytes of a message; more than a worker ever sends


@contextlib.contextmanager
def socket_dir() -> Iterator[str]:
    """A new folder for the API servers' sockets, open to its owner alone."""
    temporary = tempfile.gettempdir()
    short_enough = len(os.fsencode(temporary)) < MAX_TMPDIR_BYTES
    with tempfile.TemporaryDirectory(prefix="em-inf-", dir=temporary if short_enough else "/tmp") as folder:
        yield folder


def server_address() -> str | None:
    """Where the API servers are, as the environment has it: "ipc://folder" or "tcp://host:port"; None: nowhere."""
    address, folder = os.environ.get(ADDRESS_ENV), os.environ.get(SOCKET_DIR_ENV)
    return f"tcp://{address}" if address else f"ipc://{folder}" if folder else None


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "host:port"; an IPv6 host is in brackets.

    Raises:
        ValueError: where that is not what it is.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 or (":" in host) != host.startswith("["):
        raise ValueError(f"got {text!r}; must be HOST:PORT, with a port from 1 up to 65535")
    return host, int(port)


def new_socket_name(number: int) -> str:
    """A channel for the API server of that number."""
    return f"{secrets.token_hex(16)}.{number}"


def connect(context: "zmq.Context[zmq.Socket[bytes]]", server_address: str, channel: str) -> "zmq.Socket[bytes]":
    """A worker's end.

    Raises:
        FileNotFoundError: where no such API server has a socket in the folder. By TCP nobody can tell.
    """
    if server_address.startswith("ipc://") and not Path(server_address.removeprefix("ipc://"), channel).exists():
        raise FileNotFoundError(channel)
    end = context.socket(zmq.PUSH)
    end.setsockopt(zmq.LINGER, 0)
    end.setsockopt(zmq.IPV6, 1)
    end.connect(_endpoint(server_address, channel))
    return end


def listen(context: "zmq.Context[zmq.Socket[bytes]]", server_address: str, channel: str) -> "zmq.Socket[bytes]":
    """An API server's end.

    Raises:
        RuntimeError: where it cannot listen there.
    """
    end = context.socket(zmq.PULL)
    end.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    end.setsockopt(zmq.IPV6, 1)
    try:
        end.bind(_numeric(_endpoint(server_address, channel)))
    except (OSError, zmq.ZMQError) as error:
        end.close()
        raise RuntimeError(f"cannot listen for statistics on {_endpoint(server_address, channel)}: {error}") from None
    return end


def _endpoint(server_address: str, channel: str) -> str:
    scheme, _, where = server_address.partition("://")
    if scheme == "ipc":
        return f"{server_address}/{channel}"
    host, port = parse_address(where)
    return f"tcp://{host}:{port + int(channel.rpartition('.')[2])}"


def _numeric(endpoint: str) -> str:
    """ZMQ connects to a host by its name, but listens on an address only."""
    if endpoint.startswith("ipc://"):
        return endpoint
    host, port = parse_address(endpoint.removeprefix("tcp://"))
    family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    return f"tcp://[{address[0]}]:{port}" if family == socket.AF_INET6 else f"tcp://{address[0]}:{port}"
