"""By TCP, only an end that holds the operator's key is connected; and what it sends is bounded."""

from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from em_sampler.stats import curve
from em_sampler.stats.curve import KEY_ENV, key_pair, read_key
from em_sampler.stats.transport import ADDRESS_ENV, MAX_MESSAGE_BYTES, connect, server_address
from harness.ports import free_port
from tests.em_sampler.stats.support import KEY, ONE, Server, server

Socket = zmq.Socket[bytes]


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(KEY_ENV, KEY)
    return f"tcp://127.0.0.1:{free_port()}"


@pytest.fixture
def listening(address: str) -> Iterator[Server]:
    with server(address) as opened:
        yield opened


@pytest.fixture
def sender() -> Iterator[Socket]:
    """A socket that is not set up as a worker's."""
    end: Socket = zmq.Context.instance().socket(zmq.PUSH)
    end.setsockopt(zmq.LINGER, 0)
    yield end
    end.close()


def is_connected(end: Socket, address: str) -> bool:
    """Connect `end`, and return whether the handshake succeeded."""
    monitor = end.get_monitor_socket()
    end.connect(address)
    succeeded = zmq.EVENT_HANDSHAKE_SUCCEEDED
    failed = (
        zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    )
    failed |= zmq.EVENT_DISCONNECTED
    try:
        while True:
            assert monitor.poll(20_000), "neither connected nor refused"
            event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
            if event & (succeeded | failed):
                return bool(event & succeeded)
    finally:
        end.disable_monitor()
        monitor.close(linger=0)


def secure(end: Socket, server_key: bytes, public_key: bytes, secret_key: bytes) -> None:
    end.curve_serverkey, end.curve_publickey, end.curve_secretkey = server_key, public_key, secret_key


def test_an_end_with_the_key_is_connected(address: str, listening: Server, sender: Socket) -> None:
    curve.secure_worker(sender)
    assert is_connected(sender, address)
    sender.send(b"heard")
    assert listening.socket.recv() == b"heard"


def test_a_stranger_without_curve_is_refused(address: str, listening: Server, sender: Socket) -> None:
    assert not is_connected(sender, address)
    assert listening.socket.poll(0) == 0


def test_a_stranger_with_another_key_is_refused(
    address: str, listening: Server, sender: Socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, KEY[::-1])
    curve.secure_worker(sender)
    assert not is_connected(sender, address)


def test_the_servers_public_key_alone_is_not_enough(address: str, listening: Server, sender: Socket) -> None:
    secure(sender, key_pair("server")[0], *zmq.curve_keypair())
    assert not is_connected(sender, address)


def test_a_message_that_is_too_long_ends_its_connection(address: str, listening: Server, sender: Socket) -> None:
    curve.secure_worker(sender)
    assert is_connected(sender, address)
    sender.send(bytes(MAX_MESSAGE_BYTES + 1))
    end = connect(zmq.Context.instance(), address, ONE)
    try:
        end.send(b"heard")
        assert listening.socket.recv() == b"heard"
        assert listening.socket.poll(0) == 0
    finally:
        end.close()


def test_both_ends_derive_the_same_keys_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = []
    for key in (KEY, KEY[::-1], f" {KEY}\n"):  # a file's last line end is not part of a key
        monkeypatch.setenv(KEY_ENV, key)
        pairs.append((key_pair("server"), key_pair("worker")))
    assert pairs[0] == pairs[2]
    assert len({pair for both in pairs for pair in both}) == 4


@pytest.mark.parametrize("key", [None, "", "   ", "x" * 31])
def test_without_a_key_nothing_listens_or_sends(key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)
    if key is not None:
        monkeypatch.setenv(KEY_ENV, key)
    monkeypatch.setenv(ADDRESS_ENV, "127.0.0.1:8600")
    calls: list[Any] = [read_key, server_address, lambda: connect(zmq.Context.instance(), "tcp://127.0.0.1:1", ONE)]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"set EM_INF_STATISTICS_KEY to the same 32 or more random characters"):
            call()
