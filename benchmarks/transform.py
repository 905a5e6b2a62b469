"""What the transform costs, against eager torch, torch.compile and the released method: `make bench`.

Writes transform.csv and transform.png, and prints every figure and a table of targets. On the CPU with sizes cut.

Columns of the CSV, a line for each case and arm:
    device, torch_version, threads: where it was run.
    arm: an implementation of benchmarks/arms.py.
    rows, vocab, steps, share, origin, method: the case (benchmarks/cases.py); logits: benchmarks/logits.py.
    time_us, time_us_low, time_us_high: one call in microseconds, median and quartiles over `rounds`. On CUDA the
        device's own time, with the host ahead of it.
    host_us: until the call came back to the host, median.
    gb_per_s: one read and one write of the logits (8 bytes each) in that time, in 1e9 bytes per second.
    copy_us: `out.copy_(logits)`, which is that read and write, in the same rounds.
    of_copy and its quartiles: copy over call, the share of a copy's bandwidth.
    log_softmax_us: `torch.log_softmax(logits, -1, out=out)` in the same rounds.
    x_log_softmax and its quartiles: call over log_softmax.
    rounds: how many. status: ok, or why the arm failed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.arms import ARMS, applies
from benchmarks.cases import CPU, CUDA, QUICK, Case, Sizes, limited, unique
from benchmarks.logits import language_model_logits
from benchmarks.plot import plot
from benchmarks.results import Machine, Result, Results
from benchmarks.targets import Target, cuda_targets, log_softmax_cases, log_softmax_targets, table
from benchmarks.timing import take_turns

MAY_FAIL = "compiled"  # torch.compile needs a compiler that a machine may lack


def measure(arm: str, case: Case, logits: Tensor, budget: float) -> Result:
    """One arm on one case, in about `budget` seconds."""
    try:
        return Result.of(arm, case, take_turns(ARMS[arm](case, logits.device), logits, budget))
    except Exception as error:  # one arm's failure is a line of the report, not the end of the others
        return Result.failed(arm, case, error)


def run(arms: Sequence[str], sizes: Sizes, device: torch.device, budget: float) -> Results:
    """Every case with every arm that can, a line printed for each as it is done."""
    results = Results()
    shared = unique([case for _, case, _ in log_softmax_cases(sizes.base)] + sizes.sweep())
    for case in unique(shared + (sizes.every_size() if sizes.grid else [])):
        wanted = [arm for arm in arms if applies(arm, case) and (case in shared or arm == "ours")]
        if not wanted:
            continue
        print(case, flush=True)
        logits = language_model_logits(case.rows, case.vocab, origin=case.origin, device=device)
        for arm in wanted:
            results.append(measure(arm, case, logits, budget))
            print(f"  {results[-1]}", flush=True)
    return results


def targets(results: Results, sizes: Sizes, device: torch.device) -> list[Target]:
    """Those of the device."""
    on_one_core = device.type == "cpu" and torch.get_num_threads() == 1
    figures = log_softmax_targets(results, sizes.base, on_one_core=on_one_core)
    return cuda_targets(results, sizes) + figures if device.type == "cuda" else figures


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, type=torch.device, help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--out", default="build/bench", type=Path, help="folder to write to (build/bench)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds in all: does it run?")
    parser.add_argument("--arms", default=tuple(ARMS), type=_arms, help=f"some of {','.join(ARMS)}")
    parser.add_argument("--rows", type=_numbers, help="such as 1,16,64, instead of the device's own")
    parser.add_argument("--vocab", type=_numbers, help="such as 32000,151936, likewise")
    parser.add_argument("--threads", default=1, type=int, help="of torch on the CPU (1)")
    parser.add_argument("--seconds", default=0.5, type=float, help="for an arm on a case, at least three rounds (0.5)")
    return parser.parse_args(arguments)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _arms(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(ARMS):
        raise argparse.ArgumentTypeError(f"no such arm: {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 where an arm failed that should not."""
    args = parsed(arguments)
    torch.set_num_threads(args.threads)
    sizes = limited(QUICK if args.quick else CUDA if args.device.type == "cuda" else CPU, args.rows, args.vocab)
    args.out.mkdir(parents=True, exist_ok=True)
    results = run(args.arms, sizes, args.device, 0.01 if args.quick else args.seconds)
    machine = Machine.of(args.device)
    results.save(args.out / "transform.csv", machine)
    plot(results, sizes, machine, args.out / "transform.png")
    print(f"\n{machine.device}, torch {machine.torch_version}, {machine.threads} thread(s); base case: {sizes.base}\n")
    print(table(targets(results, sizes, args.device)))
    print(f"\nwritten: {args.out / 'transform.csv'}, {args.out / 'transform.png'}")
    return int(any(not result.ok and result.arm != MAY_FAIL for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
