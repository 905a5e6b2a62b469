"""The sockets by which workers send stats to API servers: files in a folder, or TCP between machines.

A socket name stands for one API server: random digits, which every message repeats, and the server's index.
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

from em_sampler.stats import curve

SOCKET_DIR_ENV = "EM_INF_TELEMETRY_DIR"  # the folder of the sockets, made by em-serve for its owner alone
ADDRESS_ENV = "EM_INF_STATISTICS_ADDRESS"  # instead of the folder, host:port; API server i listens on port + i
SOCKET_NAME_PATTERN = re.compile("[0-9a-f]{32}[.](0|[1-9][0-9]{0,3})")
MAX_TMPDIR_BYTES = 50  # a unix socket's path has at most 107, of which the socket's and the folder's name take 54
MAX_MESSAGE_BYTES = 2**20  # more than a worker ever sends: wire.MAX_ROWS
MAX_QUEUED_MESSAGES = 256  # of one connection, at each end


@contextlib.contextmanager
def socket_dir() -> Iterator[str]:
    """Make a folder for the API servers' sockets, open to its owner alone, and remove it at the end."""
    temporary = tempfile.gettempdir()
    short_enough = len(os.fsencode(temporary)) < MAX_TMPDIR_BYTES
    with tempfile.TemporaryDirectory(prefix="em-inf-", dir=temporary if short_enough else "/tmp") as folder:
        yield folder


def server_address() -> str | None:
    """Read the API servers' address from the environment: "ipc://folder" or "tcp://host:port", None without one.

    Raises:
        RuntimeError: if TCP has no key.
    """
    address, folder = os.environ.get(ADDRESS_ENV), os.environ.get(SOCKET_DIR_ENV)
    if address:
        curve.read_key()
    return f"tcp://{address}" if address else f"ipc://{folder}" if folder else None


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of "host:port"; an IPv6 host is in brackets.

    Raises:
        ValueError: if `text` is not HOST:PORT.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 or (":" in host) != host.startswith("["):
        raise ValueError(f"got {text!r}; must be HOST:PORT, with a port from 1 up to 65535")
    return host, int(port)


def new_socket_name(server_index: int) -> str:
    """Make a name for the socket of the API server of that index."""
    return f"{secrets.token_hex(16)}.{server_index}"


def connect(context: "zmq.Context[zmq.Socket[bytes]]", address: str, socket_name: str) -> "zmq.Socket[bytes]":
    """Open a worker's end. `address`: see `server_address`.

    Raises:
        FileNotFoundError: if the folder has no such socket. By TCP nobody can know.
    """
    if address.startswith("ipc://") and not Path(address.removeprefix("ipc://"), socket_name).exists():
        raise FileNotFoundError(socket_name)
    end = context.socket(zmq.PUSH)
    end.setsockopt(zmq.LINGER, 0)
    end.setsockopt(zmq.IPV6, 1)
    end.setsockopt(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
    if address.startswith("tcp://"):
        curve.secure_worker(end)
    end.connect(_endpoint(address, socket_name))
    return end


def listen(address: str, socket_name: str) -> "zmq.Socket[bytes]":
    """Open an API server's end. `address`: see `server_address`.

    Raises:
        RuntimeError: if the address is taken or not this machine's.
    """
    # By TCP, a context of its own: who may connect is decided by context.
    context = zmq.Context() if address.startswith("tcp://") else zmq.Context.instance()
    end = context.socket(zmq.PULL)
    end.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    end.setsockopt(zmq.RCVHWM, MAX_QUEUED_MESSAGES)
    end.setsockopt(zmq.IPV6, 1)
    endpoint = _endpoint(address, socket_name)
    try:
        if address.startswith("tcp://"):
            curve.secure_server(context, end)
        end.bind(_resolved(endpoint))
    except Exception as error:
        end.close()  # if it stayed open, its context would wait for it for ever when it is collected
        if isinstance(error, OSError | zmq.ZMQError):
            raise RuntimeError(f"cannot listen for statistics on {endpoint}: {error}") from None
        raise
    return end


def _endpoint(address: str, socket_name: str) -> str:
    """Return ZMQ's endpoint of one API server: a file in the folder, or a port by the server's index."""
    scheme, _, host_and_port = address.partition("://")
    if scheme == "ipc":
        return f"{address}/{socket_name}"
    host, port = parse_address(host_and_port)
    return f"tcp://{host}:{port + int(socket_name.rpartition('.')[2])}"


def _resolved(endpoint: str) -> str:
    """Replace a host's name by its IP address: ZMQ connects to names, but does not listen on them."""
    if endpoint.startswith("ipc://"):
        return endpoint
    host, port = parse_address(endpoint.removeprefix("tcp://"))
    family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    return f"tcp://[{address[0]}]:{port}" if family == socket.AF_INET6 else f"tcp://{address[0]}:{port}"
