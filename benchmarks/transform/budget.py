"""Predicted time of each Triton kernel on an H100, without a card: `python -m benchmarks.transform.budget`.

From the machine code that Triton compiles for sm_90 and from the bytes that a kernel moves, so that a measurement
(`benchmarks.transform.kernels`) can contradict it. A kernel's prediction is the largest of four times:

memory: the logits that it reads and writes, at the bandwidth of a copy;
issue: its instructions, by the pipe that is busiest (throughputs: CUDA's programming guide, compute capability 9.0);
latency: its waves of programs, each as long as a chain of dependent loads and the barriers of its steps;
atomics: the histogram's additions in the L2 cache, the least certain of all.
"""

import argparse
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import triton

from benchmarks.transform.logits import language_model_logits
from em_sampler.transforms.batch import BatchParams
from em_sampler.transforms.triton_cuda import LAUNCHES, TritonTransform
from em_sampler.transforms.triton_kernels import NARROW
from harness.stub_driver import StubDriver

# An H100 SXM.
MULTIPROCESSORS, SCHEDULERS, CLOCK_MHZ = 132, 4, 1755
REGISTERS, THREADS, SHARED_BYTES = 65_536, 2048, 233_472  # of a multiprocessor
COPY_BYTES_PER_US = 3.0e6  # read and written
# Assumptions.
LOAD_US = 0.6  # a load from memory, beside others
BARRIER_US = 0.05  # a barrier, with what the threads do between two of them
LAUNCH_US = 1.0  # from one kernel's end to the next one's begin
L2_ADDITIONS_PER_US = 96 * CLOCK_MHZ / 3  # a 32-byte sector a cycle in each slice; hot cells cost a factor of 3
SECTORS_PER_ADDITION = 12.4 / 32  # of a warp's 32 additions, 12.4 sectors differ
CUTOFF_NATS = 25.0  # logits further below the peak are not counted

# Per kernel: logits moved (read + written) by an idle row and by an active one, and dependent loads of a program.
TRAFFIC = {
    "row_stats_kernel": (1, 1, 2),
    "row_scalars_kernel": (0, 0, 2),
    "histogram_kernel": (0, 1, 3),
    "solve_kernel": (0, 0, 5),
    "apply_kernel": (0, 2, 4),
}
ALL_ROWS = ("row_stats_kernel", "row_scalars_kernel")  # work for idle rows too
# The pipe that an instruction needs, by the longest prefix of its name, and for how many cycles of its scheduler a warp
# keeps it busy. Pipes work side by side; each instruction also takes the scheduler itself for one cycle.
PIPES = {
    **dict.fromkeys(("I", "LOP", "SHF", "LEA", "VI", "PRMT", "SEL", "FSEL", "FSETP", "FMNMX", "PLOP"), ("integer", 2)),
    **dict.fromkeys(("IMAD", "IDP"), ("multiply", 2)),
    **dict.fromkeys(("F2", "I2"), ("special", 2)),
    **dict.fromkeys(("MUFU", "POPC"), ("special", 8)),
    **dict.fromkeys(("SHFL", "LDS", "STS", "ATOMS"), ("shared memory", 4)),
}


class Binaries(StubDriver):
    """A stub driver that keeps every kernel's machine code."""

    def __init__(self) -> None:
        super().__init__()
        self.binaries = list[tuple[bytes, int]]()  # with the bytes of shared memory, in the order of loading

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Keep the machine code."""
        self.binaries.append((binary, shared))
        return super().load_binary(name, binary, shared, device)


@dataclass(frozen=True)
class Loop:
    """A loop in a kernel's machine code."""

    first: int  # address of its first instruction, as is `last`
    last: int
    cycles: int = 0  # that one pass of one warp takes of the busiest pipe
    barriers: int = 0


@dataclass(frozen=True)
class MachineCode:
    """What the budget needs to know of a compiled kernel."""

    kernel: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    cycles: int  # that one warp takes of the busiest pipe, loops left out
    loop: Loop  # the largest one

    @property
    def resident(self) -> int:
        """Return how many programs a multiprocessor holds at a time."""
        by_registers = REGISTERS // (math.ceil(self.registers / 8) * 8 * 32 * self.warps)
        by_shared = SHARED_BYTES // (self.shared_bytes + 1024)
        return min(by_registers, by_shared, THREADS // (32 * self.warps), 32)


def read_machine_code(kernel: str, warps: int, binary: bytes, shared_bytes: int) -> MachineCode:
    """Disassemble a kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(\w+)([^;]*);", sass)
    instructions = [(int(address, 16), name, rest) for address, name, rest in lines]
    jumps = [
        (int(target[1], 16), address)
        for address, name, rest in instructions
        if name == "BRA" and (target := re.search(r"0x([0-9a-f]+)", rest))
    ]
    loops = [
        Loop(first, last, busiest_pipe(inside), inside.count("BAR"))
        for first, last in jumps
        if first < last and (inside := [name for address, name, _ in instructions if first <= address <= last])
    ]
    outside = [
        name for address, name, _ in instructions if not any(each.first <= address <= each.last for each in loops)
    ]
    largest = max(loops, key=lambda loop: loop.cycles, default=Loop(0, 0))
    return MachineCode(kernel, warps, used["REG"], used["STACK"], shared_bytes, busiest_pipe(outside), largest)


def busiest_pipe(names: Sequence[str]) -> int:
    """Return for how many cycles these instructions of a warp need the pipe that they need most, or the scheduler."""
    cycles = Counter(scheduler=len(names))
    for name in names:
        if prefixes := [prefix for prefix in PIPES if name.startswith(prefix)]:
            pipe, busy = PIPES[max(prefixes, key=len)]
            cycles[pipe] += busy
    return max(cycles.values())


@dataclass(frozen=True)
class Prediction:
    """What one launch takes, in microseconds, and the term that decides it."""

    us: float
    bound: str


class Budget:
    """The kernels of a vocabulary, compiled for rows that are aligned to 16 bytes."""

    def __init__(self, vocab: int) -> None:
        driver = Binaries()
        driver.install()
        self.vocab = vocab
        self.transform = TritonTransform(vocab, torch.device("cpu"), 1)
        launches = zip(LAUNCHES, driver.binaries, strict=False)  # loaded in this order, then for the other alignment
        self.codes = [read_machine_code(kernel.__name__, warps, *binary) for (kernel, warps, _), binary in launches]
        logits = language_model_logits(8, vocab, origin="bfloat16")
        self.counted = float((logits > logits.amax(1, keepdim=True) - CUTOFF_NATS).sum()) / len(logits)

    def predict(self, rows: int, active: int, steps: int) -> list[Prediction]:
        """Predict each launch of a call with so many rows, of which so many take so many steps."""
        logits, params = torch.empty(1, self.vocab).expand(rows, -1), BatchParams.of([None] * rows)
        grids = [grid for grid, _ in self.transform._launches(logits, params.values, self.transform.stats)]
        return [self._launch(i, math.prod(grid) // rows, rows, active, steps) for i, grid in enumerate(grids)]

    def _launch(self, number: int, programs: int, rows: int, active: int, steps: int) -> Prediction:
        """Predict a launch of so many programs for each row."""
        code, particles = self.codes[number], LAUNCHES[number][2]
        idle_reads, active_moves, loads = TRAFFIC[code.kernel]
        working = rows if code.kernel in ALL_ROWS else active
        if particles and particles > NARROW.value:
            working = 0  # its rows are few
        passes = steps if particles else 0
        cycles = code.cycles + passes * code.loop.cycles
        chain_us = loads * LOAD_US + passes * code.loop.barriers * BARRIER_US
        at_a_time = MULTIPROCESSORS * code.resident
        leaving_us = (rows - working) * programs / at_a_time * LOAD_US
        times = {
            "memory": ((rows - active) * idle_reads + active * active_moves) * self.vocab * 4 / COPY_BYTES_PER_US,
            "issue": working * programs * code.warps * cycles / (MULTIPROCESSORS * SCHEDULERS) / CLOCK_MHZ,
            "latency": max(working * programs / at_a_time, min(working, 1)) * chain_us + max(leaving_us, LOAD_US),
        }
        if code.kernel == "histogram_kernel":
            times["atomics"] = active * self.counted * SECTORS_PER_ADDITION / L2_ADDITIONS_PER_US
        bound = max(times, key=lambda name: times[name])
        return Prediction(times[bound] + LAUNCH_US, bound)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the machine code's figures and the predictions, as markdown tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default=[1, 64, 256], type=int, nargs="+")
    parser.add_argument("--shares", default=[0.0, 1.0], type=float, nargs="+", help="of the rows that are active")
    parser.add_argument("--steps", default=[5, 15], type=int, nargs="+")
    parser.add_argument("--vocab", default=151_936, type=int)
    args = parser.parse_args(arguments)
    budget = Budget(args.vocab)
    print("| kernel | warps | registers | spilled bytes | shared bytes | programs on a multiprocessor |")
    print("|---|---|---|---|---|---|")
    for code in budget.codes:
        print(
            f"| {code.kernel} | {code.warps} | {code.registers} | {code.spilled_bytes} | {code.shared_bytes} ", end=""
        )
        print(f"| {code.resident} |")
    print("\n| rows, active, steps |", *(f"{code.kernel} |" for code in budget.codes), "sum | a copy |")
    print("|---" * (len(budget.codes) + 3) + "|")
    for rows, share, steps in product(args.rows, args.shares, args.steps):
        active = round(rows * share)
        if not active and steps != args.steps[0]:
            continue
        launches = budget.predict(rows, active, steps)
        copy_us = 2 * rows * args.vocab * 4 / COPY_BYTES_PER_US
        print(f"| {rows}, {active}, {steps} |", *(f"{each.us:.0f} {each.bound} |" for each in launches), end="")
        print(f" {sum(each.us for each in launches):.0f} | {copy_us:.0f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
