"""What only the Triton kernels can get wrong: repeats, what memory holds, ties. Launches: tests/ptx/test_launch.py."""

import math

import pytest
import torch

from em_sampler import AdaptiveTemperatureParams, EMInfParams
from em_sampler.params import MeasureParams, Params
from em_sampler.transforms import reference, triton_cuda
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
    for memory in vars(transform).values():  # as after vLLM's sleep mode, which discards what memory holds
        if isinstance(memory, torch.Tensor):
            memory.view(torch.uint8).fill_(0x55)
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


@pytest.mark.parametrize("shape", [(7, VOCAB), (2, VOCAB - 1), (2, VOCAB + 1)])
def test_a_batch_that_does_not_fit_is_refused(shape: tuple[int, int]) -> None:
    transform = TritonTransform(VOCAB, torch.device(DEVICE), len(MIXED))
    with pytest.raises(ValueError, match=f"at most 6 rows x {VOCAB}"):
        transform(torch.zeros(shape, device=DEVICE), BatchParams.of([None] * shape[0], DEVICE))


@pytest.mark.parametrize("ties", [2, 3, 10])
@pytest.mark.parametrize("gap", [0.0, 1e-3])
def test_tied_tops_match_the_reference_over_64_steps(ties: int, gap: float) -> None:
    generator = torch.Generator().manual_seed(ties)
    before = torch.randn(4, 64, generator=generator) * 3
    before[:, :ties] = before.amax(1, keepdim=True) + 1 - gap * torch.rand(4, ties, generator=generator)
    params = EMInfParams(threshold=0.0, steps=64)
    transform = TritonTransform(64, torch.device(DEVICE), 4)
    after = transform(before.to(DEVICE, copy=True), BatchParams.of([params] * 4, DEVICE)).logits.cpu()
    for row in range(4):
        z, _ = expected(before[row], params)
        assert total_variation(after[row].double().numpy(), z) < 1e-3


def test_near_ties_among_many_heavy_logits_match_the_reference() -> None:
    """Their chunk has more logits of at least 1/4096 than slots: frequent tokens stand side by side in vocabularies."""
    generator = torch.Generator().manual_seed(4)
    before = torch.randn(2, 3 * 4096, generator=generator) - 25
    before[:, :1100] = math.log(2.7e-4) - 0.001 * torch.rand(2, 1100, generator=generator)
    before[:, 700:703] = math.log(0.7 / 3) - 0.001 * torch.rand(2, 3, generator=generator)
    assert (before.softmax(-1)[:, :1100] >= 1 / 4096).sum(-1).min() > 1024  # the slots of a chunk
    params = EMInfParams(threshold=0.0, steps=64)
    transform = TritonTransform(before.shape[1], torch.device(DEVICE), 2)
    after = transform(before.to(DEVICE, copy=True), BatchParams.of([params] * 2, DEVICE)).logits.cpu()
    for row in range(2):
        z, _ = expected(before[row], params)
        assert total_variation(after[row].double().numpy(), z) < 1e-3


@pytest.mark.parametrize(
    ("ties", "gap", "masked", "params"),
    [
        (6000, 1e-5, 0, EMInfParams(threshold=0.0)),
        (6000, 1e-5, 6200, EMInfParams(threshold=0.0)),  # -inf says nothing of where the others come from
        (8000, 1e-4, 0, EMInfParams(threshold=0.0, learning_rate=0.5)),
        (12_000, 2e-2, 0, EMInfParams(threshold=0.0, learning_rate=0.5, kl_weight=0.5, steps=8)),  # the wide solve's
        (12_000, 1e-3, 0, EMInfParams(threshold=0.0, steps=15)),
        pytest.param(6000, 1e-4, 0, EMInfParams(threshold=0.0, steps=64), marks=pytest.mark.slow),
    ],
)
def test_near_ties_among_light_logits_match_the_reference(
    ties: int, gap: float, masked: int, params: EMInfParams
) -> None:
    """None of them is heavy, and most of the row's probability is in cells that part: without doubt, up to 0.56."""
    generator = torch.Generator().manual_seed(6)
    before = torch.randn(1, 3 * 4096, generator=generator)
    before[:, :ties] = before.max() + 10 - gap * torch.rand(1, ties, generator=generator)
    before[:, before.shape[1] - masked :] = -math.inf
    transform = TritonTransform(before.shape[1], torch.device(DEVICE), 1)
    result = transform(before.to(DEVICE, copy=True), BatchParams.of([params], DEVICE))
    z, _ = expected(before[0], params)
    assert total_variation(result.logits[0].double().cpu().numpy(), z) < 1e-4
    assert result.entropy_after.item() == pytest.approx(reference.entropy(z), abs=1e-4)


def test_equal_light_tops_that_move_apart_from_another_match_the_reference() -> None:
    """All are bfloat16 values. A cell's mean is a sum of positions, not quite the value: steep curves magnify that."""
    before = torch.randn(1, 3 * 4096, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    before[:, :8000], before[:, 0] = 20.0, 20.125
    params = EMInfParams(threshold=0.0, learning_rate=0.5)
    transform = TritonTransform(before.shape[1], torch.device(DEVICE), 1)
    after = transform(before.to(DEVICE, copy=True), BatchParams.of([params], DEVICE)).logits.cpu()
    z, _ = expected(before[0], params)
    assert total_variation(after[0].double().numpy(), z) < 1e-4


def test_a_row_of_adaptive_temperature_works_on_the_cells_that_hold_logits() -> None:
    """Its layout reaches far down: with empty cells among its particles, it would go to the wide, slow program."""
    transform = TritonTransform(VOCAB, torch.device(DEVICE), 1)
    transform(normal_rows(1)[:1], BatchParams.of([AdaptiveTemperatureParams(threshold=0.0)], DEVICE))
    held = int((transform.counts != 0).sum() + transform.heavy_counts.sum())
    assert transform.particle_counts.tolist() == [held]


def test_a_uniform_row_is_not_solved_logit_by_logit() -> None:
    """Its cell's tangent is steep, but nothing moves: a large vocabulary would cost milliseconds."""
    transform = TritonTransform(VOCAB, torch.device(DEVICE), 1)
    transform(torch.full((1, VOCAB), -1.5, device=DEVICE), BatchParams.of([EMInfParams(threshold=0.0)], DEVICE))
    assert transform.particle_counts.tolist() == [1]


def test_faint_logits_are_not_retraced() -> None:
    """A row has thousands whose moves fade to nothing: to retrace them takes longer than all else."""
    transform = TritonTransform(VOCAB, torch.device(DEVICE), 1)
    transform(2 * normal_rows(1)[:1], BatchParams.of([EMInfParams(threshold=0.0)], DEVICE))
    has_no_tangent = transform.moves[transform.counts != 0] & 1
    assert len(has_no_tangent) > 100
    assert has_no_tangent.sum() == 0


def test_a_large_batch_is_transformed_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    params = BatchParams.of(MIXED, DEVICE)
    whole = TritonTransform(VOCAB, torch.device(DEVICE), len(MIXED))(normal_rows(5), params)
    monkeypatch.setattr(triton_cuda, "MAX_GROUP_ROWS", 4)
    transform = TritonTransform(VOCAB, torch.device(DEVICE), len(MIXED))
    assert len(transform.counts) == 4
    grouped = transform(normal_rows(5), params)
    assert torch.equal(grouped.logits.view(torch.int32), whole.logits.view(torch.int32))
    assert torch.equal(grouped.stats, whole.stats)


@pytest.mark.skipif(DEVICE.startswith("cpu"), reason="needs a GPU (benchmarks/gpu.sh)")
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
