"""Time of the transform in units of one log_softmax of the same logits: `python -m benchmarks.transform --device cuda`.

Transform and log_softmax take turns in one run; each line gives the median ratio and its quartiles.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from em_sampler import AdaptiveTemperatureParams, EMInfParams
from em_sampler.params import Params
from em_sampler.rows import RowParams
from em_sampler.torch_batched import BatchedTransform

CASES: dict[str, Params] = {
    "em_inf, 5 steps": EMInfParams(threshold=0.0),
    "em_inf, 15 steps": EMInfParams(threshold=0.0, steps=15),
    "em_inf, below its threshold": EMInfParams(threshold=20.0),
    "adaptive temperature": AdaptiveTemperatureParams(threshold=0.0),
}


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rows", default=16, type=int)
    parser.add_argument("--vocab", default=151_936, type=int)
    parser.add_argument("--rounds", default=9, type=int)
    parser.add_argument("--threads", default=1, type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # Of bfloat16 origin, as an engine's logits are.
    logits = (torch.randn(args.rows, args.vocab) * 3).bfloat16().float().to(args.device)
    transform = BatchedTransform(args.vocab, args.device, args.rows)
    scratch = logits.clone()

    def once(packed: RowParams) -> float:
        scratch.copy_(logits)
        return seconds(lambda: transform(scratch, packed), args.device)

    print(f"{args.rows} x {args.vocab} on {args.device}, {args.threads} thread(s), {args.rounds} rounds")
    for name, params in CASES.items():
        packed = RowParams.of([params] * args.rows, args.device)
        once(packed)
        ratios = [
            once(packed) / seconds(lambda: torch.log_softmax(logits, -1), args.device) for _ in range(args.rounds)
        ]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(f"{name:30} {median:7.1f} x log_softmax   (quartiles {low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
