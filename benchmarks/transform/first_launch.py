"""Launch every kernel of the Triton transform once, with the exception in full if one fails: `benchmarks/gpu.sh check`.

The dispatch would log one line and go on with the eager transform. On the CPU the kernels run under Triton's
interpreter, with TRITON_INTERPRET=1.
"""

import argparse
from collections.abc import Sequence

import torch

from benchmarks.transform.cases import Case, Method
from benchmarks.transform.logits import language_model_logits
from em_sampler.transforms.batch import BatchParams
from em_sampler.transforms.eager import EagerTransform
from em_sampler.transforms.triton_cuda import TritonTransform

METHODS: tuple[Method, ...] = ("adam", "sgd", "adaptive", "mixed")
MAX_DISTANCE = 1e-4  # of probabilities, in total variation


def main(arguments: Sequence[str] | None = None) -> int:
    """Run each method and print how far it is from the eager transform; return 1 if one is too far."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--rows", default=5, type=int)
    parser.add_argument("--vocab", default=151_936, type=int)
    args = parser.parse_args(arguments)
    transform = TritonTransform(args.vocab, args.device, args.rows)
    eager = EagerTransform(args.vocab, args.device, args.rows)
    logits = language_model_logits(args.rows, args.vocab, origin="bfloat16", device=args.device)
    furthest = 0.0
    for method in METHODS:
        params = BatchParams.of(Case(args.rows, args.vocab, method=method).params(), args.device)
        ours, wanted = (each(logits.clone(), params).logits.double().softmax(-1) for each in (transform, eager))
        distance = float((ours - wanted).abs().sum(-1).max() / 2)
        furthest = max(furthest, distance)
        print(f"{method}: {distance:.1e} from the eager transform (at most {MAX_DISTANCE:.0e})", flush=True)
    return int(not furthest <= MAX_DISTANCE)


if __name__ == "__main__":
    raise SystemExit(main())
