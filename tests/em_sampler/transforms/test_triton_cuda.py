"""The CUDA kernels where they differ from the other forms: repeats, what stays behind, compilation without a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from em_sampler import AdaptiveTemperatureParams, EMInfParams
from em_sampler.params import MeasureParams, Params
from em_sampler.transforms.batch import BatchParams
from em_sampler.transforms.triton_cuda import TritonTransform
from tests.em_sampler.transforms.support import DEVICE, expected, total_variation

MIXED: list[Params | None] = [
    EMInfParams(threshold=0.0),
    AdaptiveTemperatureParams(threshold=0.0),
    None,
    EMInfParams(threshold=0.0, optimizer="sgd", steps=12),
    MeasureParams(),
    EMInfParams(threshold=0.0, steps=64),
]
VOCAB = 9001


def rows_of(seed: int) -> torch.Tensor:
    return (torch.randn(len(MIXED), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3).to(DEVICE)


def test_repeats_are_the_same_to_the_bit() -> None:
    """Every tensor-parallel rank has to find the same; what other batches left behind must not show."""
    engine, params = TritonTransform(VOCAB, torch.device(DEVICE), len(MIXED)), BatchParams.of(MIXED, DEVICE)
    first = [values.clone() for values in engine(rows_of(1), params)]
    engine(rows_of(2), params)
    assert not engine.counts.any()
    for one, other in zip(engine(rows_of(1), params), first, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("origin", [torch.bfloat16, torch.float16, torch.float32])
def test_long_descents(origin: torch.dtype) -> None:
    """Sixty-four steps, where the tangents of cells and the retraced logits have to carry far."""
    before = rows_of(3).to(origin).float()
    params: list[Params | None] = [
        EMInfParams(threshold=0.0, steps=64, learning_rate=rate, kl_weight=kl)
        for rate in (0.02, 0.1, 0.4)
        for kl in (0.0, 0.05)
    ]
    engine = TritonTransform(VOCAB, torch.device(DEVICE), len(params))
    after = engine(before.clone(), BatchParams.of(params, DEVICE)).logits
    for row, wanted in enumerate(params):
        assert wanted is not None
        z, _ = expected(before[row].cpu(), wanted)
        assert total_variation(after[row].double().cpu().numpy(), z) < 2e-4


COMPILE = """
import em_sampler.transforms.triton_cuda as fused, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
sizes = {"vocab": 151_936, "splits": 38, "power": 64}
integers = {"stride": "i32", "counts": "*i64", "tangents": "*i64", "steps": "*i32"}
for kernel, warps in ((fused._measure, 16), (fused._count, 16), (fused._solve, 16), (fused._move, 32)):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in sizes else integers.get(name, "*fp32") for name in names}
    constants = {(names.index(name),): size for name, size in sizes.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in sizes}
    options = {"num_warps": warps, "enable_fp_fusion": False}
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
        print(kernel.__name__, capability, len(made.asm["cubin"]), "fma.rn.f32" in made.asm["ptx"])
"""


def test_the_kernels_compile_for_a_gpu() -> None:
    """For Ampere and Hopper, by the assembler that Triton brings; no GPU is asked for."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [(name, int(capability)) for name, capability, _, _ in lines] == [
        (name, capability) for name in ("_measure", "_count", "_solve", "_move") for capability in (80, 90)
    ]
    assert all(int(size) > 1000 for _, _, size, _ in lines)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU (benchmarks/gpu.sh)")
def test_nothing_waits_for_the_device_or_allocates() -> None:
    engine, params = TritonTransform(VOCAB, torch.device(DEVICE), len(MIXED)), BatchParams.of(MIXED, DEVICE)
    logits = rows_of(1)
    engine(logits, params)
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rows in (1, 3, len(MIXED)):
            engine(logits[:rows], BatchParams(params.values[:rows], params.max_steps, params.any_adaptive))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
