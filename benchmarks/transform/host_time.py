"""Host time of the Triton transform, without a card: `python -m benchmarks.transform.host_time`.

A stub stands for Triton's CUDA driver: a launch ends where the driver's own work would begin. What is left is Python:
checks, slices, arguments, and Triton's way to a launch.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from em_sampler.transforms.batch import BatchParams
from em_sampler.transforms.triton_cuda import TritonTransform
from harness.stub_driver import StubDriver

TIMED_S = 1.0  # for each number of rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the host time of a call for each number of rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default=[1, 64, 256, 1024], type=int, nargs="+")
    parser.add_argument("--vocab", default=151_936, type=int)
    args = parser.parse_args(arguments)
    StubDriver().install()
    transform = TritonTransform(args.vocab, torch.device("cpu"), max(args.rows))
    for rows in args.rows:
        logits, params = torch.empty(1, args.vocab).expand(rows, -1), BatchParams.of([None] * rows)
        times, end = list[float](), time.perf_counter() + TIMED_S
        while time.perf_counter() < end:
            started = time.perf_counter()
            transform(logits, params)
            times.append((time.perf_counter() - started) * 1e6)
        low, median, high = statistics.quantiles(times, n=4)
        print(f"{rows} x {args.vocab}: {median:.1f} us (quartiles {low:.1f} to {high:.1f}, {len(times)} calls)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
