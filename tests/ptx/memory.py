"""The memories of a launch: bounds, alignment, and accesses that nothing puts in order.

Two accesses to a place, not both reads and not both atomics, race unless one thread makes both or a barrier of their
CTA lies between them. Nothing orders CTAs: atomics that acquire or release are not emulated.
"""

import ctypes
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Lanes = npt.NDArray[Any]

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NOBODY, SEVERAL = -1, -2
THREADS, SEVERAL_THREADS = 2048, 1024  # one more than the highest thread of a CTA
# What an access may race with.
CONFLICTS = {"read": ("write", "atomic"), "write": ("read", "write", "atomic"), "atomic": ("read", "write")}


class KernelError(RuntimeError):
    """What a GPU does not show, or stops at: a race, or an access out of bounds or misaligned."""


class Clock:
    """Which CTA runs, and the barriers passed so far by all CTAs: each CTA begins after one."""

    cta, barriers = 0, 1


class Accesses:
    """Who accessed each place in one way: the CTA, and its thread if it was since the last barrier."""

    def __init__(self, places: int, clock: Clock) -> None:
        self.clock = clock
        self.ctas = np.full(places, NOBODY, np.int32)
        self.threads = np.zeros(places, np.int64)  # barriers * THREADS + the thread, or SEVERAL_THREADS

    def race_with(self, places: Lanes, threads: Lanes) -> bool:
        """Return whether somebody else accessed one of the places, and nothing orders that before these threads."""
        ctas, last, now = self.ctas[places], self.threads[places], self.clock.barriers * THREADS
        return bool(((ctas != NOBODY) & (ctas != self.clock.cta) | (last >= now) & (last != now + threads)).any())

    def add(self, places: Lanes, threads: Lanes) -> None:
        """Note that each of the threads accessed a place."""
        ctas, last, now = self.ctas[places], self.threads[places], self.clock.barriers * THREADS
        self.ctas[places] = np.where((ctas == NOBODY) | (ctas == self.clock.cta), self.clock.cta, SEVERAL)
        self.threads[places] = np.where((last < now) | (last == now + threads), now + threads, now + SEVERAL_THREADS)
        shared = self.threads[places] != now + threads  # with an earlier thread, or one of these
        self.threads[places[shared]] = now + SEVERAL_THREADS


class Region:
    """Neighbouring bytes, in places of `grain` bytes."""

    def __init__(self, base: int, data: Lanes, grain: int, clock: Clock) -> None:
        self.base, self.data, self.grain = base, data, grain
        self.accesses = {kind: Accesses(len(data) // grain + 1, clock) for kind in CONFLICTS}

    def access(self, kind: str, offsets: Lanes, size: int, threads: Lanes, what: str) -> None:
        """Note accesses of `size` bytes at `offsets`.

        Raises:
            KernelError: if they race with earlier ones.
        """
        places = (offsets[:, None] // self.grain + np.arange(size // self.grain)).reshape(-1)
        threads = np.repeat(threads, size // self.grain)
        for other in CONFLICTS[kind]:
            if self.accesses[other].race_with(places, threads):
                raise KernelError(f"race: {kind} after another thread's {other}: {what}")
        self.accesses[kind].add(places, threads)

    def numbers(self, width: int) -> Lanes:
        """Return the bytes as unsigned numbers."""
        return self.data[: len(self.data) // width * width].view(UNSIGNED[width])


class Memory:
    """Regions of one address space."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self.regions = list(regions)

    def _accessed(
        self, kind: str, addresses: Lanes, size: int, threads: Lanes, what: str
    ) -> Iterator[tuple[Region, Lanes, Lanes]]:
        """Yield the regions, which lanes access them, and where, once it is clear that they may."""
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise KernelError(f"misaligned: {what}")
        left = np.ones(len(addresses), bool)
        for region in self.regions:
            inside = (addresses >= region.base) & (addresses + size <= region.base + len(region.data))
            if inside.any():
                offsets = addresses[inside] - region.base
                region.access(kind, offsets, size, threads[inside], what)
                yield region, np.flatnonzero(inside), offsets
                left &= ~inside
            if not left.any():
                return
        raise KernelError(f"out of bounds: {what}")

    def load(self, addresses: Lanes, width: int, count: int, threads: Lanes, what: str) -> Lanes:
        """Return [lane, component]: each lane loads `count` neighbouring numbers of `width` bytes."""
        out = np.empty((len(addresses), count), UNSIGNED[width])
        for region, lanes, offsets in self._accessed("read", addresses, width * count, threads, what):
            out[lanes] = region.numbers(width)[offsets[:, None] // width + np.arange(count)]
        return out

    def store(self, addresses: Lanes, values: Lanes, threads: Lanes, what: str) -> None:
        """Store `values` [lane, component]."""
        width, count = values.dtype.itemsize, values.shape[1]
        for region, lanes, offsets in self._accessed("write", addresses, width * count, threads, what):
            numbers, places = region.numbers(width), offsets[:, None] // width + np.arange(count)
            numbers[places] = values[lanes]
            if (numbers[places] != values[lanes]).any():  # threads may write the same: Triton's reductions do
                raise KernelError(f"race: two threads write different numbers to one place: {what}")

    def add(self, addresses: Lanes, values: Lanes, threads: Lanes, what: str) -> Lanes:
        """Add integers atomically, one lane after the other; return what was there before each."""
        width, out = values.dtype.itemsize, np.empty_like(values)
        for region, lanes, offsets in self._accessed("atomic", addresses, width, threads, what):
            numbers = region.numbers(width)
            for lane, place in zip(lanes, offsets // width, strict=True):
                out[lane] = numbers[place]
                numbers[place] += values[lane]
        return out


def global_memory(tensors: Iterable[torch.Tensor], clock: Clock) -> Memory:
    """Return the storages of the tensors that a launch was given."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return Memory(
        Region(base, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base)), 4, clock)
        for base, size in storages.items()
        if size
    )


def shared_memory(size: int, clock: Clock) -> Memory:
    """Return a CTA's shared memory, with anything in it."""
    return Memory([Region(0, np.full(size, 0x55, np.uint8), 1, clock)])
