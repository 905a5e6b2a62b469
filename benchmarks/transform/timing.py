"""Times a call on logits, a copy of the same logits and one log_softmax of them, one after the other in each round.

Measured by perf_counter on the CPU and by events around each call on CUDA.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MIN_ROUNDS, MAX_ROUNDS = 3, 101
MAX_HEAD_START_S = 0.02
CYCLES_PER_SECOND = 2e9  # of a GPU's clock, roughly; a head start need not be exact


class RoundTimes(NamedTuple):
    """The times of one round, in seconds."""

    call: float
    host: float  # until the call returned, perhaps before the device was done; on the CPU the same as `call`
    copy: float
    log_softmax: float


def time_rounds(call: Callable[[Tensor], object], logits: Tensor, budget_s: float) -> list[RoundTimes]:
    """Time rounds of call, copy and log_softmax for about `budget_s` seconds, but at least MIN_ROUNDS.

    The order alternates from round to round, so that a drift of the machine affects all three. `call` gets the same
    logits each time: they are written again before it, outside the measured time. Caches are not flushed: in an engine,
    too, the logits were written just before, and those of a large batch do not fit into a cache anyway. log_softmax
    writes into the same memory as the copy: if it allocates its result, it takes up to three times as long on a CPU,
    depending on the state of the allocator.
    """
    scratch, out = logits.clone(), torch.empty_like(logits)
    span = _Span(logits.device)

    def timed_call() -> tuple[float, float]:
        scratch.copy_(logits)
        return span(lambda: call(scratch))

    timed_call()  # compiles, allocates
    start = time.perf_counter()
    span.head_start_s = min(1.5 * timed_call()[1] + 1e-4, MAX_HEAD_START_S)
    rounds = int(budget_s / (time.perf_counter() - start))

    def timed_copy() -> tuple[float, float]:
        return span(lambda: out.copy_(logits))

    def timed_log_softmax() -> tuple[float, float]:
        return span(lambda: torch.log_softmax(logits, -1, out=out))

    works = (timed_call, timed_copy, timed_log_softmax)
    timed_copy(), timed_log_softmax()
    rounds_times = []
    for number in range(min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)):
        order = (0, 1, 2) if number % 2 == 0 else (2, 1, 0)
        times = {index: works[index]() for index in order}
        rounds_times.append(RoundTimes(times[0][0], times[0][1], times[1][0], times[2][0]))
    return rounds_times


class _Span:
    """Measures some work: seconds (on the device, on the host until it returned)."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.head_start_s = 1e-4  # keeps the device busy before the work, so that it never waits for a launch

    def __call__(self, work: Callable[[], object]) -> tuple[float, float]:
        return self._on_cuda(work) if self.cuda else self._on_cpu(work)

    @staticmethod
    def _on_cpu(work: Callable[[], object]) -> tuple[float, float]:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        return seconds, seconds

    def _on_cuda(self, work: Callable[[], object]) -> tuple[float, float]:
        """Measure the device's time as in an engine whose host runs ahead of it, and the host's time beside it."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(int(self.head_start_s * CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]
        first.record()
        start = time.perf_counter()
        work()
        host = time.perf_counter() - start
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3, host
