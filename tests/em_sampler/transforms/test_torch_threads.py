"""Tasks on torch's threads: each runs once, and its error comes back."""

import threading

import pytest

from em_sampler.transforms import torch_threads


def test_every_task_runs_once() -> None:
    done: list[int] = []
    lock = threading.Lock()

    def note(number: int) -> None:
        with lock:
            done.append(number)

    torch_threads.run_all(lambda number=number: note(number) for number in range(9))  # type: ignore[misc]
    assert sorted(done) == list(range(9))


def test_an_error_in_a_thread_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        torch_threads.run_all([lambda: 1, lambda: 1 / 0, lambda: 1])
