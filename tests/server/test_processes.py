"""A child whose parent is killed ends itself, however deep."""

import multiprocessing
import os
import time
from pathlib import Path

import psutil
import pytest

from server.processes import CHILD_ENV, end_with_parent

HANG_LIMIT_S = 120


def child(folder: Path, depth: int) -> None:
    end_with_parent()
    (folder / str(depth)).write_text(str(os.getpid()))
    if depth:
        multiprocessing.get_context("spawn").Process(target=child, args=(folder, depth - 1)).start()
    time.sleep(HANG_LIMIT_S)


def test_children_end_with_a_killed_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHILD_ENV, "1")
    first = multiprocessing.get_context("spawn").Process(target=child, args=(tmp_path, 2))
    first.start()
    deadline = time.monotonic() + HANG_LIMIT_S
    while not ((last := tmp_path / "0").exists() and last.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    others = [psutil.Process(int((tmp_path / depth).read_text())) for depth in ("1", "0")]
    first.kill()
    first.join()
    _, left = psutil.wait_procs(others, HANG_LIMIT_S / 2)
    assert not left


def test_a_process_that_em_serve_did_not_start_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHILD_ENV, raising=False)
    started: list[object] = []
    monkeypatch.setattr("threading.Thread.start", started.append)
    end_with_parent()
    assert not started
