"""What only the Triton kernels can get wrong: repeats, what stays behind, compilation without a GPU."""

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


def normal_rows(seed: int) -> torch.Tensor:
    return (torch.randn(len(MIXED), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3).to(DEVICE)


def test_repeats_are_equal_to_the_bit() -> None:
    """All tensor-parallel ranks must agree; nothing that another batch left behind may matter."""
    transform, params = TritonTransform(VOCAB, torch.device(DEVICE), len(MIXED)), BatchParams.of(MIXED, DEVICE)
    first = [values.clone() for values in transform(normal_rows(1), params)]
    transform(normal_rows(2), params)
    assert not transform.counts.any()
    for one, other in zip(transform(normal_rows(1), params), first, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize(
    "origin", [torch.bfloat16, *(pytest.param(each, marks=pytest.mark.slow) for each in (torch.float16, torch.float32))]
)
def test_many_steps_match_the_reference(origin: torch.dtype) -> None:
    """Over 64 steps, errors of the tangents and of the retraced logits add up."""
    before = normal_rows(3).to(origin).float()
    params: list[Params | None] = [
        EMInfParams(threshold=0.0, steps=64, learning_rate=rate, kl_weight=kl)
        for rate in (0.02, 0.1, 0.4)
        for kl in (0.0, 0.05)
    ]
    transform = TritonTransform(VOCAB, torch.device(DEVICE), len(params))
    after = transform(before.clone(), BatchParams.of(params, DEVICE)).logits
    for row, wanted in enumerate(params):
        assert wanted is not None
        z, _ = expected(before[row].cpu(), wanted)
        assert total_variation(after[row].double().cpu().numpy(), z) < 2e-4


COMPILE = """
import em_sampler.transforms.triton_cuda as kernels, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
sizes = {"VOCAB": 151_936, "SPLITS": 38, "SPLITS_POW2": 64}
integers = {"row_stride": "i32", "counts_ptr": "*i64", "tangents_ptr": "*i64", "steps_ptr": "*i32"}
warps = {"_row_stats_kernel": 16, "_histogram_kernel": 16, "_solve_kernel": 16, "_apply_kernel": 32}
for kernel_name in warps:
    kernel = getattr(kernels, kernel_name)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in sizes else integers.get(name, "*fp32") for name in names}
    constants = {(names.index(name),): size for name, size in sizes.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in sizes}
    options = {"num_warps": warps[kernel_name], "enable_fp_fusion": False}
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
        print(kernel_name, capability, len(made.asm["cubin"]), "fma.rn.f32" in made.asm["ptx"])
"""


def test_the_kernels_compile_for_a_gpu() -> None:
    """For Ampere and Hopper, with the assembler that comes with Triton; this needs no GPU."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    kernels = "_row_stats_kernel", "_histogram_kernel", "_solve_kernel", "_apply_kernel"
    assert [(name, int(capability)) for name, capability, _, _ in lines] == [
        (name, capability) for name in kernels for capability in (80, 90)
    ]
    assert all(int(size) > 1000 for _, _, size, _ in lines)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU (benchmarks/gpu.sh)")
def test_nothing_waits_for_the_device_or_allocates() -> None:
    transform, params = TritonTransform(VOCAB, torch.device(DEVICE), len(MIXED)), BatchParams.of(MIXED, DEVICE)
    logits = normal_rows(1)
    transform(logits, params)
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rows in (1, 3, len(MIXED)):
            transform(logits[:rows], BatchParams(params.values[:rows], params.max_steps, params.any_adaptive))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
