"""Predicted time of each Triton kernel on an H100, without a card: `python -m benchmarks.transform.budget`.

From the machine code that Triton compiles for sm_90, the instructions that an emulator of PTX executes for a generated
row, and the bytes that a kernel moves, so that a measurement (`benchmarks.transform.kernels`) can contradict it. A
kernel's prediction is the largest of four times:

memory: the logits that it reads and writes, at the bandwidth of a copy;
issue: its instructions, by the pipe that is busiest (throughputs: CUDA's programming guide, compute capability 9.0);
latency: the dependent loads and the barriers of a program, as often as programs follow one another;
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
from em_sampler.params import MAX_THRESHOLD, EMInfParams
from em_sampler.transforms.batch import BatchParams
from em_sampler.transforms.triton_cuda import LAUNCHES, TritonTransform
from em_sampler.transforms.triton_kernels import CUTOFF_NATS_EM_INF
from harness.stub_driver import Launch, StubDriver
from tests.ptx.approximations import Approximations
from tests.ptx.emulator import Emulator

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

# Logits moved (read + written) by an idle row and by an active one, and the dependent loads of a row's work in a
# program: for the kernels that share the chunks of active rows, those of one chunk.
TRAFFIC = {
    "row_stats_kernel": (1, 1, 2),
    "row_scalars_kernel": (0, 0, 2),
    "histogram_kernel": (0, 1, 5),
    "solve_kernel": (0, 0, 5),
    "apply_kernel": (0, 2, 9),
}
# The pipe that an instruction needs, by the longest prefix of its name, and for how many cycles of its scheduler a warp
# keeps it busy. Pipes work side by side; each instruction also takes the scheduler itself for one cycle.
PIPES = {
    **dict.fromkeys(("I", "LOP", "SHF", "LEA", "VI", "PRMT", "SEL", "FSEL", "FSETP", "FMNMX", "PLOP"), ("integer", 2)),
    **dict.fromkeys(("IMAD", "IDP"), ("multiply", 2)),
    **dict.fromkeys(("F2", "I2"), ("special", 2)),
    **dict.fromkeys(("MUFU", "POPC"), ("special", 8)),
    **dict.fromkeys(("SHFL", "LDS", "STS", "ATOMS"), ("shared memory", 4)),
}


def busiest_pipe(names: Sequence[str]) -> int:
    """Return for how many cycles these instructions of a warp need the pipe that they need most, or the scheduler."""
    cycles = Counter(scheduler=len(names))
    for name in names:
        if prefixes := [prefix for prefix in PIPES if name.startswith(prefix)]:
            pipe, busy = PIPES[max(prefixes, key=len)]
            cycles[pipe] += busy
    return max(cycles.values())


@dataclass(frozen=True)
class MachineCode:
    """What the budget needs to know of a compiled kernel."""

    kernel: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    cycles: int  # of the busiest pipe, if a warp executes every instruction once

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
    names = [name for name in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)", sass) if name != "NOP"]
    return MachineCode(kernel, warps, used["REG"], used["STACK"], shared_bytes, busiest_pipe(names))


@dataclass(frozen=True)
class Executed:
    """What the programs of one launch executed for one row."""

    instructions: int  # PTX's, of all warps
    share: float  # of the kernel's instructions, if a warp executes each once: `instructions` / (PTX's in the code)
    barriers: float  # of one program


class Recorder(StubDriver):
    """A stub driver that keeps the machine code of what is loaded, and counts what launches execute."""

    def __init__(self) -> None:
        self.emulator = Emulator(Approximations(scale=0.0))
        super().__init__(execute=self.count)
        self.binaries = list[tuple[bytes, int]]()  # with the bytes of shared memory, in the order of loading
        self.executed = list[Executed]()

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Keep the machine code."""
        self.binaries.append((binary, shared))
        return super().load_binary(name, binary, shared, device)

    def count(self, launch: Launch) -> None:
        """Execute a launch and note how much that was."""
        code = self.emulator.program(launch.ptx).code
        for operation in code:
            operation.executed = 0
        self.emulator(launch)
        instructions = sum(operation.executed for operation in code)
        barriers = sum(operation.executed for operation in code if operation.kind == "bar")
        programs = math.prod(launch.grid) * launch.threads // 32
        self.executed.append(Executed(instructions, instructions / len(code), barriers / programs))


@dataclass(frozen=True)
class Prediction:
    """What one launch takes, in microseconds, and the term that decides it."""

    us: float
    bound: str


class Budget:
    """The kernels of a vocabulary, compiled for rows that are aligned to 16 bytes, and what they execute."""

    def __init__(self, vocab: int) -> None:
        recorder = Recorder()
        recorder.install()
        self.vocab = vocab
        self.transform = TritonTransform(vocab, torch.device("cpu"), 1)
        launches = zip(LAUNCHES, recorder.binaries, strict=False)  # loaded in this order, then for the other alignment
        self.codes = [read_machine_code(kernel.__name__, warps, *binary) for (kernel, warps, _), binary in launches]
        logits = language_model_logits(8, vocab, origin="bfloat16")
        self.counted = float((logits > logits.amax(1, keepdim=True) - CUTOFF_NATS_EM_INF.value).sum()) / len(logits)

        def execute(params: EMInfParams) -> list[Executed]:
            recorder.executed.clear()
            self.transform(logits[:1].clone(), BatchParams.of([params]))
            return recorder.executed.copy()

        self.idle = execute(EMInfParams(threshold=MAX_THRESHOLD))
        self.by_steps = {steps: execute(EMInfParams(threshold=0.0, steps=steps)) for steps in (1, 5)}

    def predict(self, rows: int, active: int, steps: int) -> list[Prediction]:
        """Predict each launch of a call with so many rows, of which so many take so many steps."""
        logits, params = torch.empty(1, self.vocab).expand(rows, -1), BatchParams.of([None] * rows)
        grids = [grid for grid, _ in self.transform._launches(logits, params.values, self.transform.stats)]
        return [self._launch(i, math.prod(grid), rows, active, steps) for i, grid in enumerate(grids)]

    def _launch(self, number: int, programs: int, rows: int, active: int, steps: int) -> Prediction:
        """Predict a launch of so many programs."""
        code, idle = self.codes[number], self.idle[number]
        one, five = self.by_steps[1][number], self.by_steps[5][number]
        share = one.share + (five.share - one.share) / 4 * (steps - 1)
        barriers = one.barriers + (five.barriers - one.barriers) / 4 * (steps - 1)
        idle_reads, active_moves, loads = TRAFFIC[code.kernel]
        at_a_time = min(programs, MULTIPROCESSORS * code.resident)
        if code.kernel in ("histogram_kernel", "apply_kernel"):
            rounds = math.ceil(active * self.transform.splits / at_a_time)
        else:
            rounds = programs / at_a_time * (1 if idle_reads else active / rows)
        times = {
            "memory": ((rows - active) * idle_reads + active * active_moves) * self.vocab * 4 / COPY_BYTES_PER_US,
            "issue": ((rows - active) * idle.share + active * share)
            * (code.cycles / (MULTIPROCESSORS * SCHEDULERS) / CLOCK_MHZ),
            "latency": LOAD_US + rounds * (loads * LOAD_US + barriers * BARRIER_US),
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
    print("| kernel | warps | registers | spilled bytes | shared bytes | programs on a multiprocessor |", end="")
    print(" warp instructions of PTX, idle row | 5 steps |")
    print("|---|---|---|---|---|---|---|---|")
    for code, idle, active in zip(budget.codes, budget.idle, budget.by_steps[5], strict=True):
        print(f"| {code.kernel} | {code.warps} | {code.registers} | {code.spilled_bytes} |", end="")
        print(f" {code.shared_bytes} | {code.resident} | {idle.instructions:,} | {active.instructions:,} |")
    print("\n| rows, active, steps |", *(f"{code.kernel} |" for code in budget.codes), "sum | a copy |")
    print("|---" * (len(budget.codes) + 3) + "|")
    for rows, share, steps in product(args.rows, args.shares, args.steps):
        active_rows = round(rows * share)
        if not active_rows and steps != args.steps[0]:
            continue
        launches = budget.predict(rows, active_rows, steps)
        copy_us = 2 * rows * args.vocab * 4 / COPY_BYTES_PER_US
        print(f"| {rows}, {active_rows}, {steps} |", *(f"{each.us:.0f} {each.bound} |" for each in launches), end="")
        print(f" {sum(each.us for each in launches):.0f} | {copy_us:.0f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
