"""Which implementation runs on which device, the warning if it does not work, and the one kept for `transform`."""

import logging
import threading
from collections.abc import Callable

import pytest
import torch

import em_sampler
from em_sampler import AdaptiveTemperatureParams, EMInfParams, MeasureParams
from em_sampler.params import Params
from em_sampler.transforms import dispatch, eager
from em_sampler.transforms.batch import STATS, BatchParams, Transform, TransformOutput
from em_sampler.transforms.dispatch import MAX_KEPT, ReusableTransform, build_transform
from em_sampler.transforms.eager import EagerTransform
from tests.em_sampler.transforms.support import (
    DEVICE,
    FLOAT32_DRIFT,
    expected,
    numba_cpu,
    numba_transform,
    rows_of,
    total_variation,
)

CPU = torch.device("cpu")
EM, ADAPTIVE = EMInfParams(threshold=0.0), AdaptiveTemperatureParams(threshold=0.0)
MIXED: list[Params | None] = [EM, ADAPTIVE, None, MeasureParams(), EMInfParams(threshold=0.0, optimizer="sgd")]


class Builds:
    """The implementations that were built, with the size that each was built for."""

    def __init__(self) -> None:
        self.transforms: list[Transform] = []
        self.sizes: list[tuple[int, int]] = []  # (vocab, most rows)

    def build(self, vocab_size: int, device: torch.device, max_rows: int) -> Transform:
        self.transforms.append(build_transform(vocab_size, device, max_rows))
        self.sizes.append((vocab_size, max_rows))
        return self.transforms[-1]


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    """Watch what `transform` builds, beginning with nothing."""
    recorded = Builds()
    monkeypatch.setattr(dispatch, "build_transform", recorded.build)
    monkeypatch.setattr(dispatch, "_shared", ReusableTransform())
    return recorded


def assert_equal(one: TransformOutput, other: TransformOutput) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))  # NaN equals NaN


def mixed_params(rows: int) -> list[Params | None]:
    return (MIXED * rows)[:rows]


def test_the_cpu_has_the_numba_transform() -> None:
    assert isinstance(build_transform(50, CPU, 4), numba_transform())


def test_other_devices_have_the_eager_transform() -> None:
    assert isinstance(build_transform(50, torch.device("meta"), 4), EagerTransform)


def break_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU's fast implementation fail when it is built."""

    def broken(*_: object) -> Transform:
        raise OSError("no compiler")

    monkeypatch.setitem(dispatch._BUILDERS, "cpu", broken)


def test_a_fused_form_that_is_required_but_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_transform(50, CPU, 4, require_fused=True).name == "numba_cpu"
    with pytest.raises(RuntimeError, match="meta has the eager one alone"):
        build_transform(50, torch.device("meta"), 4, require_fused=True)
    break_builder(monkeypatch)
    with pytest.raises(RuntimeError, match="OSError: no compiler"):
        build_transform(50, CPU, 4, require_fused=True)
    assert build_transform(50, CPU, 4).name == "eager"


def test_an_implementation_that_does_not_work_is_replaced_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_builder(monkeypatch)
    with caplog.at_level(logging.WARNING):
        built = build_transform(50, CPU, 4)
    assert isinstance(built, EagerTransform)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "OSError: no compiler" in caplog.text
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    wanted = eager.transform(logits.clone(), [EMInfParams()] * 3).logits
    assert torch.equal(built(logits, BatchParams.of([EMInfParams()] * 3)).logits, wanted)


def test_the_public_transform_is_the_fast_one_and_matches_the_reference(builds: Builds) -> None:
    before = rows_of(1, 5, 700)
    logits = before.clone()
    result = em_sampler.transform(logits, MIXED)
    assert result.logits is logits
    assert [type(built) for built in builds.transforms] == [numba_transform()]
    assert_equal(result, numba_cpu(before.clone(), MIXED))
    for row, params in enumerate(MIXED):
        if params is None or isinstance(params, MeasureParams):
            assert torch.equal(logits[row], before[row])
        else:
            z, steps = expected(before[row], params)
            assert total_variation(logits[row].double().numpy(), z) < FLOAT32_DRIFT
            assert result.steps[row] == steps


def test_the_eager_function_never_uses_the_fast_implementation(builds: Builds) -> None:
    eager.transform(rows_of(1, 2, 50), [EM, ADAPTIVE])
    assert builds.transforms == []


def test_the_implementation_is_kept_while_the_batch_fits(builds: Builds) -> None:
    for rows in (3, 4, 1, 0, 2, 4):
        before = rows_of(rows, rows, 300)
        assert_equal(em_sampler.transform(before.clone(), mixed_params(rows)), numba_cpu(before, mixed_params(rows)))
    assert builds.sizes == [(300, 4)]


def test_a_growing_batch_rebuilds_rarely(builds: Builds) -> None:
    for rows in [*range(1, 65), *range(64, 0, -9)]:
        before = rows_of(rows, rows, 30)
        assert_equal(em_sampler.transform(before.clone(), mixed_params(rows)), numba_cpu(before, mixed_params(rows)))
    assert [max_rows for _, max_rows in builds.sizes] == [1, 2, 4, 8, 16, 32, 64]


def test_a_batch_of_no_rows_returns_no_rows(builds: Builds) -> None:
    result = em_sampler.transform(torch.zeros(0, 300), [])
    assert result.logits.shape == (0, 300)
    assert result.stats.shape == (STATS, 0)
    assert len(em_sampler.transform(rows_of(1, 2, 300), [EM, None]).steps) == 2


def test_vocabularies_in_turn_are_all_kept(builds: Builds) -> None:
    for turn in range(3):
        for vocab in (50, 4200, 301):
            before = rows_of(turn, 5, vocab)
            assert_equal(em_sampler.transform(before.clone(), MIXED), numba_cpu(before, MIXED))
    assert [vocab for vocab, _ in builds.sizes] == [50, 4200, 301]


def test_the_implementations_used_longest_ago_are_dropped(builds: Builds) -> None:
    first, second, *others = vocabularies = list(range(20, 20 + MAX_KEPT))
    for vocab in [*vocabularies, first, 60, *others, first, second]:  # `second` makes room for 60
        before = rows_of(vocab, 5, vocab)
        assert_equal(em_sampler.transform(before.clone(), MIXED), numba_cpu(before, MIXED))
    assert [vocab for vocab, _ in builds.sizes] == [*vocabularies, 60, second]
    assert len(dispatch._shared._kept) == MAX_KEPT


SLICES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "padding cut off": lambda padded: padded[:, :500],
    "every other row": lambda padded: padded[::2],
    "every other logit": lambda padded: padded[:, ::2],
    "transposed": lambda padded: padded.t(),
    "one row, every third logit": lambda padded: padded[3:4, ::3],
    "one logit a row": lambda padded: padded[:, 7:8],
}


@pytest.mark.parametrize("cut", SLICES.values(), ids=SLICES.keys())
def test_logits_may_lie_anywhere_in_memory(cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What is no part of the slice keeps every bit."""
    padded = rows_of(4, 10, 601, masked=0.0)
    logits, params = cut(padded), mixed_params(len(cut(padded)))
    outside = torch.ones_like(padded, dtype=torch.bool)
    cut(outside)[:] = False
    kept, wanted = padded[outside].clone(), numba_cpu(logits.contiguous().clone(), params)
    result = em_sampler.transform(logits, params)
    assert result.logits is logits
    assert_equal(TransformOutput(logits.contiguous(), result.stats), wanted)
    assert torch.equal(padded[outside], kept)


def test_rows_that_share_memory_are_refused() -> None:
    with pytest.raises(RuntimeError, match="single memory location"):
        em_sampler.transform(rows_of(1, 1, 50).expand(3, -1), [EM] * 3)


def test_threads_take_turns(builds: Builds) -> None:
    """Each thread checks its own results, while the others have batches of the same size and of others."""
    batches = [rows_of(seed, 6, 5000 if seed % 3 else 70).bfloat16().float() for seed in range(6)]
    wanted = [numba_cpu(batch.clone(), mixed_params(6)) for batch in batches]
    start, failures = threading.Barrier(len(batches)), list[BaseException]()

    def work(batch: torch.Tensor, right: TransformOutput) -> None:
        try:
            start.wait()
            for _ in range(15):
                assert_equal(em_sampler.transform(batch.clone(), mixed_params(6)), right)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(builds.sizes) == [(70, 8), (5000, 8)]


@pytest.mark.parametrize("origin", ["the device's own", "triton"])
def test_a_result_survives_the_next_call(origin: str, builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton transform itself overwrites the stats that it returned."""
    if origin == "triton":
        monkeypatch.setitem(dispatch._BUILDERS, torch.device(DEVICE).type, dispatch._build_triton)
    batches = [rows_of(seed, 2, 40).to(DEVICE) for seed in (1, 2)]
    first = em_sampler.transform(batches[0], [EM, ADAPTIVE])
    kept = [values.clone() for values in first]
    second = em_sampler.transform(batches[1], [MeasureParams(), None])
    assert len(builds.transforms) == 1
    assert not torch.equal(first.stats, second.stats)
    assert_equal(first, TransformOutput(*kept))


def test_what_was_built_in_inference_mode_works_outside_of_it(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    break_builder(monkeypatch)  # only the eager transform writes to its memory by torch's operations
    before = rows_of(1, 5, 200)
    with torch.inference_mode():
        inside = em_sampler.transform(before.clone(), MIXED)
    outside = em_sampler.transform(before.clone(), MIXED)
    assert [type(built) for built in builds.transforms] == [EagerTransform]
    assert_equal(inside, outside)


def test_logits_that_require_gradients_are_changed_in_place() -> None:
    before = rows_of(1, 5, 200)
    for logits in (before.clone().requires_grad_(), before.t().contiguous().t().requires_grad_()):
        em_sampler.transform(logits, MIXED)
        assert torch.equal(logits.detach(), numba_cpu(before.clone(), MIXED).logits)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU (benchmarks/gpu.sh)")
def test_streams_do_not_share_an_implementation(builds: Builds) -> None:
    """What two streams were given runs at the same time, so it must not use the same memory."""
    batches = [rows_of(seed, 8, 150_000).to(DEVICE) for seed in range(4)]
    wanted = [em_sampler.transform(batch.clone(), mixed_params(8)) for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    results = []
    for stream, batch in zip(streams, batches, strict=True):
        with torch.cuda.stream(stream):
            results.append(em_sampler.transform(batch, mixed_params(8)))
    torch.cuda.synchronize()
    assert len(builds.transforms) == 1 + len(streams)
    for result, right in zip(results, wanted, strict=True):
        assert_equal(result, right)
