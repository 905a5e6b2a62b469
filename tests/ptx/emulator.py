"""An emulator of PTX: it executes a launch CTA by CTA, in random order, and looks for what a GPU would not show.

A race, or an access out of bounds or misaligned, is an error (tests/ptx/memory.py). A CTA's threads run together, those
that are furthest behind first. It shows neither the weak order of memory nor how long anything takes.
"""

import random
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from harness.stub_driver import Launch
from tests.ptx.approximations import Approximations
from tests.ptx.instructions import TYPES, Instruction, Mask, Step, decode
from tests.ptx.memory import Clock, KernelError, Lanes, Memory, global_memory, shared_memory


@dataclass
class Operation:
    """One instruction, decoded: `kind` is "step", "bra", "bar" or "ret"."""

    kind: str
    step: Step | None = None
    target: str = ""
    guard: str = ""  # the register of a predicate; "" if all threads take part
    negated: bool = False
    executed: int = 0  # by how many warps so far


class Program:
    """A kernel's PTX, decoded once."""

    def __init__(self, ptx: str, approximations: Approximations) -> None:
        self.approximations = approximations
        self.registers: dict[str, Any] = {}  # their types
        self.labels: dict[str, int] = {}
        header, _, rest = ptx.partition("\n{")
        body, _, rest = rest.partition("\n}")
        if header.count(".entry") != 1 or "\n{" in rest:
            raise NotImplementedError("PTX with more than one function")
        self.text = re.sub(r"//.*|^\s*\.(loc|pragma)\b.*", "", body, flags=re.MULTILINE)
        texts: list[str] = []
        for statement in re.sub(r"(\$\w+:)", r"\1;", self.text).split(";"):
            text = " ".join(statement.split())
            if text.endswith(":"):
                self.labels[text[:-1]] = len(texts)
            elif text.startswith(".reg"):
                self._declare(text)
            elif text:
                texts.append(text)
        self.code = [self._operation(text) for text in texts]

    def _declare(self, text: str) -> None:
        match = re.fullmatch(r"\.reg \.(\w+) (%\w+)<(\d+)>", text)
        if not match:
            raise NotImplementedError(f"PTX declaration not emulated: {text}")
        self.registers |= {f"{match[2]}{number}": TYPES[match[1]] for number in range(int(match[3]))}

    def _operation(self, text: str) -> Operation:
        guard, negated = "", False
        if text.startswith("@"):
            guard, _, text = text.partition(" ")
            negated, guard = guard.startswith("@!"), guard.lstrip("@!")
        name, _, rest = text.partition(" ")
        if name in ("bra", "bra.uni"):
            return Operation("bra", None, rest, guard, negated)
        if name == "ret":
            return Operation("ret", None, "", guard, negated)
        if text == "bar.sync 0":
            if guard:
                raise Instruction(text, self).unknown()
            return Operation("bar")
        return Operation("step", decode(text, self), "", guard, negated)


class Cta:
    """One block of threads: its registers, its shared memory, and where its threads are."""

    def __init__(
        self, program: Program, launch: Launch, arguments: list[Lanes], at: tuple[int, int, int], memory: Memory,
        clock: Clock,
    ) -> None:  # fmt: skip
        self.program, self.arguments, self.at, self.memory, self.clock = program, arguments, at, memory, clock
        self.threads, self.grid = np.arange(launch.threads), launch.grid
        self.registers = {name: np.zeros(launch.threads, kind) for name, kind in program.registers.items()}
        self.shared = shared_memory(launch.shared_bytes, clock)

    def argument(self, index: int, kind: Any) -> Lanes:
        """Return an argument; those after the kernel's own are Triton's scratch memory, which is not there."""
        if index >= len(self.arguments):
            return np.zeros(1, kind)
        return self.arguments[index][: np.dtype(kind).itemsize].view(kind)

    def position(self, of: str, axis: str) -> Lanes:
        """Return the threads' position in the CTA ("tid"), the CTA's in the grid ("ctaid"), or the grid's size."""
        if of != "tid":
            return np.array([(self.at if of == "ctaid" else self.grid)["xyz".index(axis)]])
        return self.threads if axis == "x" else np.zeros(1)

    def run(self) -> None:
        """Run all threads to their end. Of groups of threads that have parted, the one furthest behind goes on.

        Raises:
            KernelError: if only some threads come to a barrier.
        """
        self.clock.barriers += 1
        groups: dict[int, Lanes] = {0: np.ones(len(self.threads), bool)}
        waiting: dict[int, Lanes] = {}
        while groups or waiting:
            if not groups:
                if not all(threads.all() for threads in waiting.values()):
                    raise KernelError("some threads wait at a barrier that others do not come to")
                groups, waiting = waiting, {}
                self.clock.barriers += 1
            at = min(groups)
            self._run_group(at, groups.pop(at), groups, waiting)

    def _run_group(self, at: int, active: Lanes, groups: dict[int, Lanes], waiting: dict[int, Lanes]) -> None:
        """Run threads until they end, part, wait or meet others."""
        nobody = np.zeros(len(self.threads), bool)
        complete = bool(active.all())
        warps = int(active.reshape(-1, 32).any(1).sum())
        while True:
            if at in groups:
                groups[at] = groups[at] | active
                return
            operation = self.program.code[at]
            operation.executed += warps
            mask: Mask = None if complete else active
            if operation.guard:
                holds = self.registers[operation.guard]
                mask = active & (~holds if operation.negated else holds)
                mask = None if mask.all() else mask
            if operation.kind == "step":
                assert operation.step is not None
                if mask is None or mask.any():
                    operation.step(self, mask)
            elif operation.kind == "bar":
                waiting[at + 1] = waiting.get(at + 1, nobody) | active
                return
            else:  # a branch or an end, for those whose guard holds; the rest goes on
                taken = active if mask is None else mask
                rest = active & ~taken
                if operation.kind == "bra" and taken.any():
                    target = self.program.labels[operation.target]
                    groups[target] = groups.get(target, nobody) | taken
                if rest.any():
                    groups[at + 1] = groups.get(at + 1, nobody) | rest
                return
            at += 1


@dataclass
class Emulator:
    """Executes launches."""

    approximations: Approximations = field(default_factory=Approximations)
    launches: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.approximations.seed)
        self.program = cache(lambda ptx: Program(ptx, self.approximations))

    def __call__(self, launch: Launch) -> None:
        """Execute a launch to its end.

        Raises:
            KernelError: what is wrong with the kernel.
        """
        self.launches += 1
        program, clock = self.program(launch.ptx), Clock()
        memory = global_memory((each for each in launch.arguments if isinstance(each, torch.Tensor)), clock)
        arguments = [bytes_of(each) for each in launch.arguments]
        ctas = list(np.ndindex(launch.grid))
        self.random.shuffle(ctas)
        with np.errstate(all="ignore"):
            for clock.cta, at in enumerate(ctas):
                try:
                    Cta(program, launch, arguments, at, memory, clock).run()
                except KernelError as error:
                    raise KernelError(f"{launch.kernel}: {error}") from error


def bytes_of(argument: object) -> Lanes:
    """Return an argument as a kernel finds it: a pointer, a float32 or an integer."""
    if isinstance(argument, torch.Tensor):
        argument = argument.data_ptr()
    if isinstance(argument, float):
        return np.array([argument], np.float32).view(np.uint8)
    assert isinstance(argument, int), argument
    return np.array([argument], np.int64).view(np.uint8)
