"""Time of the transform, beside eager torch, torch.compile, transformers and the released method: `make bench`.

Writes transform.csv and transform.png, and prints every figure and a table of targets. The CPU has smaller sizes.

Columns of the CSV, a line for each case and implementation:
    device, torch_version, threads: the machine.
    arm: a name of implementations.py.
    rows, vocab, steps, share, origin, method, temperature: the case (cases.py); logits: logits.py.
    time_us, time_us_low, time_us_high: one call in microseconds, median and quartiles over `rounds`. On CUDA the
        time of the device alone, with the host ahead of it.
    host_us: until the call returned to the host, median.
    gb_per_s: one read and one write of the logits (8 bytes per logit) in this time, in 1e9 bytes per second.
    copy_us: `out.copy_(logits)`, which is this read and write, in the same rounds.
    of_copy and its quartiles: copy over call, the share of a copy's bandwidth.
    log_softmax_us: `torch.log_softmax(logits, -1, out=out)` in the same rounds.
    x_log_softmax and its quartiles: call over log_softmax.
    rounds: their number. status: ok, or why the implementation failed.
"""

import argparse
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.transform.cases import CPU, CUDA, QUICK, Case, Sizes, limited, unique
from benchmarks.transform.implementations import IMPLEMENTATIONS, supports
from benchmarks.transform.logits import language_model_logits
from benchmarks.transform.plot import plot
from benchmarks.transform.results import Machine, Result, Results
from benchmarks.transform.targets import Target, cuda_targets, log_softmax_cases, log_softmax_targets, table
from benchmarks.transform.timing import time_rounds

MAY_FAIL = "compiled"  # torch.compile needs a compiler that a machine may lack


def measure(implementation: str, case: Case, logits: Tensor, budget_s: float) -> Result:
    """Measure one implementation on one case, in about `budget_s` seconds."""
    try:
        call = IMPLEMENTATIONS[implementation](case, logits.device)
        return Result.of(implementation, case, time_rounds(call, logits, budget_s))
    except Exception as error:  # a failure is a line of the report, and the others go on
        traceback.print_exc()
        return Result.failed(implementation, case, error)


def run(
    implementations: Sequence[str],
    sizes: Sizes,
    device: torch.device,
    budget_s: float,
    save: Callable[[Results], None],
) -> Results:
    """Measure every case with every implementation that supports it.

    Prints a line for each result and calls `save` with all so far: a run that is killed leaves what it measured.
    """
    results = Results()
    shared = unique([case for _, case, _ in log_softmax_cases(sizes.base)] + sizes.sweep())
    for case in unique(shared + (sizes.every_size() if sizes.grid else [])):
        wanted = [each for each in implementations if supports(each, case) and (case in shared or each == "ours")]
        if not wanted:
            continue
        print(case, flush=True)
        logits = language_model_logits(case.rows, case.vocab, origin=case.origin, device=device)
        for implementation in wanted:
            results.append(measure(implementation, case, logits, budget_s))
            print(f"  {results[-1]}", flush=True)
            save(results)
    return results


def targets(results: Results, sizes: Sizes, device: torch.device) -> list[Target]:
    """Return the targets for the device."""
    on_one_core = device.type == "cpu" and torch.get_num_threads() == 1
    figures = log_softmax_targets(results, sizes.base, on_one_core=on_one_core)
    return cuda_targets(results, sizes) + figures if device.type == "cuda" else figures


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line (default: that of this process)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, type=torch.device, help="cpu or cuda (cuda if there is one)")
    parser.add_argument("--out", default="build/bench", type=Path, help="folder to write to (build/bench)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a few seconds: does it run?")
    parser.add_argument(
        "--arms",
        dest="implementations",
        default=tuple(IMPLEMENTATIONS),
        type=_implementations,
        help=f"implementations to compare, some of {','.join(IMPLEMENTATIONS)}",
    )
    parser.add_argument("--rows", type=_numbers, help="such as 1,16,64 (default: the device's sizes)")
    parser.add_argument("--vocab", type=_numbers, help="such as 32000,151936 (default: the device's sizes)")
    parser.add_argument("--threads", default=1, type=int, help="threads of torch on the CPU (1)")
    parser.add_argument(
        "--seconds",
        default=0.5,
        type=float,
        help="seconds for an implementation on a case, at least three rounds (0.5)",
    )
    return parser.parse_args(arguments)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _implementations(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(IMPLEMENTATIONS):
        raise argparse.ArgumentTypeError(
            f"no such implementation: {', '.join(sorted(unknown))}; there are {', '.join(IMPLEMENTATIONS)}"
        )
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write; return 1 if an implementation failed, other than the one that may."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    sizes = limited(QUICK if args.quick else CUDA if args.device.type == "cuda" else CPU, args.rows, args.vocab)
    args.out.mkdir(parents=True, exist_ok=True)
    machine, csv = Machine.of(args.device), args.out / "transform.csv"
    results = run(
        args.implementations,
        sizes,
        args.device,
        0.01 if args.quick else args.seconds,
        lambda results: results.save(csv, machine),
    )
    plot(results, sizes, machine, args.out / "transform.png")
    print(f"\n{machine.device}, torch {machine.torch_version}, {machine.threads} thread(s); base case: {sizes.base}\n")
    print(table(targets(results, sizes, args.device)))
    print(f"\nwritten: {csv}, {args.out / 'transform.png'}")
    return int(any(not result.ok and result.implementation != MAY_FAIL for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
