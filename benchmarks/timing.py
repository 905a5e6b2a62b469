"""Time of a call on logits beside a copy and one log_softmax of the same logits, the three taking turns.

On the CPU perf_counter, on CUDA events around each call.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MIN_ROUNDS, MAX_ROUNDS = 3, 101
LONGEST_HEAD_START = 0.02  # s
CYCLES_PER_SECOND = 2e9  # of a GPU's clock, roughly; a head start need not be exact


class Turn(NamedTuple):
    """One round's times in seconds."""

    call: float
    host: float  # until the call came back, with the device perhaps still at work; on the CPU the same as `call`
    copy: float
    log_softmax: float


def take_turns(call: Callable[[Tensor], object], logits: Tensor, budget: float) -> list[Turn]:
    """Rounds of call, copy and log_softmax that take about `budget` seconds, but at least MIN_ROUNDS.

    The order alternates from round to round, so that whatever drifts meets all three. `call` gets the same logits each
    time: they are written anew before it, outside what is timed. Caches are not flushed: an engine, too, has only just
    written the logits, and those of a large batch do not fit a cache anyway. log_softmax writes where copy does: one
    that allocates its result takes up to three times as long on a CPU, as the allocator's state will have it.
    """
    scratch, out = logits.clone(), torch.empty_like(logits)
    span = _Span(logits.device)

    def timed_call() -> tuple[float, float]:
        scratch.copy_(logits)
        return span(lambda: call(scratch))

    timed_call()  # compiles, allocates
    start = time.perf_counter()
    span.head_start = min(1.5 * timed_call()[1] + 1e-4, LONGEST_HEAD_START)
    rounds = int(budget / (time.perf_counter() - start))

    def timed_copy() -> tuple[float, float]:
        return span(lambda: out.copy_(logits))

    def timed_log_softmax() -> tuple[float, float]:
        return span(lambda: torch.log_softmax(logits, -1, out=out))

    works = (timed_call, timed_copy, timed_log_softmax)
    timed_copy(), timed_log_softmax()
    turns = []
    for number in range(min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)):
        order = (0, 1, 2) if number % 2 == 0 else (2, 1, 0)
        times = {index: works[index]() for index in order}
        turns.append(Turn(times[0][0], times[0][1], times[1][0], times[2][0]))
    return turns


class _Span:
    """Seconds of one piece of work: (on the device, on the host until it came back)."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.head_start = 1e-4  # s that the device is kept busy before the work, so that no launch makes it wait

    def __call__(self, work: Callable[[], object]) -> tuple[float, float]:
        return self._on_cuda(work) if self.cuda else self._on_cpu(work)

    @staticmethod
    def _on_cpu(work: Callable[[], object]) -> tuple[float, float]:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        return seconds, seconds

    def _on_cuda(self, work: Callable[[], object]) -> tuple[float, float]:
        """The device's own time, as in an engine whose host runs ahead of it; the host's is told beside it."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(int(self.head_start * CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]
        first.record()
        start = time.perf_counter()
        work()
        host = time.perf_counter() - start
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3, host
