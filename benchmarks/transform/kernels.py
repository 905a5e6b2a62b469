"""Time of each kernel of the transform, by torch's profiler: `python -m benchmarks.transform.kernels`.

Writes kernels.csv after each case, and the same as kernels.md. On the CPU, torch's operators take the place of kernels.

Columns of the CSV: device; rows, vocab, share: the case (cases.py); kernel: its name, or "none" if the case failed;
    launches: of one call; time_us: of one launch, median; call_us: of all its launches in one call, mean; status: ok,
    or why the case failed.
The copy that restores the logits before each call is among the kernels: it is the measure of the others.
"""

import argparse
import csv
import statistics
import traceback
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.transform.cases import Case
from benchmarks.transform.implementations import ours
from benchmarks.transform.logits import language_model_logits
from benchmarks.transform.results import Machine

CALLS = 20  # in the profile of a case
WARM_UP_CALLS = 3


@dataclass(frozen=True)
class KernelTime:
    """One kernel in one case: a line of the CSV."""

    device: str
    rows: int
    vocab: int
    share: float
    kernel: str = "none"
    launches: float = 0.0
    time_us: float = 0.0
    call_us: float = 0.0
    status: str = "ok"


def measure(case: Case, device: torch.device, name: str) -> list[KernelTime]:
    """Return the kernels of one case, those that take longest first; one line with the error if it fails."""
    try:
        times = _times(case, device)
    except Exception as error:  # a failure is a line of the report, and the others go on
        traceback.print_exc()
        status = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return [KernelTime(name, case.rows, case.vocab, case.share, status=status)]
    lines = [
        KernelTime(
            name,
            case.rows,
            case.vocab,
            case.share,
            kernel,
            launches=len(each) / CALLS,
            time_us=round(statistics.median(each), 2),
            call_us=round(sum(each) / CALLS, 2),
        )
        for kernel, each in times.items()
    ]
    return sorted(lines, key=lambda line: -line.call_us)


def _times(case: Case, device: torch.device) -> dict[str, list[float]]:
    """Return the microseconds of every launch in CALLS calls, by the kernel's name."""
    on_cuda = device.type == "cuda"
    logits = language_model_logits(case.rows, case.vocab, origin=case.origin, device=device)
    call, scratch = ours(case, device), logits.clone()

    def run(calls: int) -> None:
        for _ in range(calls):
            scratch.copy_(logits)
            call(scratch)
        if on_cuda:
            torch.cuda.synchronize(device)

    run(WARM_UP_CALLS)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiled:
        run(CALLS)
    times = defaultdict[str, list[float]](list)
    for event in profiled.events() or ():
        if event.device_type.name == ("CUDA" if on_cuda else "CPU"):
            times[event.name].append(event.time_range.elapsed_us() if on_cuda else event.self_cpu_time_total)
    if not times:
        raise RuntimeError("the profiler saw no kernels")
    return times


def save(lines: Sequence[KernelTime], out: Path) -> None:
    """Write kernels.csv and kernels.md."""
    names = [field.name for field in fields(KernelTime)]
    with (out / "kernels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
    (out / "kernels.md").write_text(table(lines))


def table(lines: Sequence[KernelTime]) -> str:
    """Return a markdown table with a line for each kernel of each case."""
    text = "| rows x vocabulary | active | kernel | launches | us a launch | us a call |\n|---|---|---|---|---|---|\n"
    for line in lines:
        kernel = line.kernel[:60] if line.status == "ok" else line.status.replace("|", "/")
        text += f"| {line.rows} x {line.vocab} | {line.share:g} | {kernel} "
        text += f"| {line.launches:g} | {line.time_us:,.1f} | {line.call_us:,.1f} |\n"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile every case, print and write; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--out", default="build/bench", type=Path, help="folder to write to (build/bench)")
    parser.add_argument("--rows", default=[1, 16, 64, 256], type=int, nargs="+")
    parser.add_argument("--vocab", default=151_936, type=int)
    parser.add_argument("--shares", default=[0.0, 1.0], type=float, nargs="+", help="of the rows that are active")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    name, lines = Machine.of(args.device).device, list[KernelTime]()
    for rows, share in product(args.rows, args.shares):
        lines += measure(Case(rows, args.vocab, share=share), args.device, name)
        save(lines, args.out)
    print(table(lines))
    return int(any(line.status != "ok" for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
