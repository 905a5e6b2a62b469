"""Where API servers listen: a folder that only its owner can open, or a port each."""

import os
import re
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from em_sampler.stats.curve import KEY_ENV
from em_sampler.stats.transport import parse_address, socket_dir
from tests.em_sampler.stats.support import ONE, Server, server


@pytest.mark.parametrize("inside", ["short", "a-long-name-of-a-folder-for-temporary-files-" * 2])
def test_only_its_owner_can_open_the_folder_of_sockets(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / inside).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / inside))
    with socket_dir() as folder:
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        assert len(os.fsencode(f"{folder}/{ONE}")) <= 107  # the longest path of a unix socket
        with server(Path(folder)):
            assert os.listdir(folder) == [ONE]
    assert not os.path.exists(folder)


def test_the_folder_of_sockets_is_in_the_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as chosen:
        monkeypatch.setattr(tempfile, "tempdir", chosen)
        with socket_dir() as folder:
            assert os.path.dirname(folder) == chosen


def test_a_path_is_measured_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", suffix="é" * 30) as chosen:  # under 50 characters, over 50 bytes
        monkeypatch.setattr(tempfile, "tempdir", chosen)
        with socket_dir() as folder, server(Path(folder)):
            assert os.path.dirname(folder) == "/tmp"


def test_a_taken_or_foreign_address_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, "0123456789abcdef" * 2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for address in (f"tcp://127.0.0.1:{taken.getsockname()[1]}", "tcp://nowhere.invalid:8600"):
            with pytest.raises(RuntimeError, match=f"cannot listen for statistics on {re.escape(address)}: ."):
                Server(address, ONE)


@pytest.mark.parametrize(
    "text", ["", "8600", ":8600", "host", "host:", "host:0", "host:65536", "host:8x", "::1:8600", "[::1]"]
)
def test_text_that_is_no_address_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be HOST:PORT, with a port from 1 up to 65535"):
        parse_address(text)
