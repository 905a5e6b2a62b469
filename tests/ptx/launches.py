"""Give batches to transforms with the stub driver, and print as JSON what Triton launches and compiles for them.

A program of its own, since it needs a release of Triton that compiles: tests/ptx/test_launch.py starts it.
"""

import json

import torch
import triton

from em_sampler.transforms.batch import BatchParams
from em_sampler.transforms.triton_cuda import TritonTransform
from harness.stub_driver import StubDriver

CAPABILITIES = 80, 90  # Ampere, Hopper
VOCAB, PADDED = 32_003, 32_064  # no multiple of 16, which Triton looks at; as vLLM pads it
MAX_ROWS = 3


def main() -> None:
    stub = StubDriver()
    stub.install()
    launched, compiled = [], []
    padded, dense = torch.zeros(MAX_ROWS, PADDED)[:, :VOCAB], torch.zeros(MAX_ROWS, VOCAB)
    for stub.capability in CAPABILITIES:
        transform = TritonTransform(VOCAB, torch.device("cpu"), MAX_ROWS)
        stub.loaded.clear()
        for logits in (padded, padded[:1], padded[1:], dense, dense[:1], dense[1:]):
            stub.launched.clear()
            transform(logits, BatchParams.of([None] * len(logits)))
            launched.append(stub.launched.copy())
        compiled += stub.loaded
    print(json.dumps({"triton": triton.__version__, "launched": launched, "compiled": compiled}))


if __name__ == "__main__":
    main()
