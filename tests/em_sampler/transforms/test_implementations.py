"""Every implementation: its properties, and its agreement with the reference beyond the golden cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from em_sampler import AdaptiveTemperatureParams, EMInfParams
from em_sampler.params import MeasureParams, Params
from em_sampler.transforms import reference
from tests.em_sampler.transforms.support import (
    FLOAT32_DRIFT,
    IMPLEMENTATIONS,
    expected,
    is_interpreted,
    rows_of,
    total_variation,
)

NAN, INF = math.nan, math.inf

em_inf = st.builds(
    EMInfParams,
    threshold=st.sampled_from([0.0, 0.05, 0.3, 1.0, 20.0]),
    steps=st.integers(0, 20),
    learning_rate=st.sampled_from([0.01, 0.1, 0.5]),
    kl_weight=st.sampled_from([0.0, 0.001, 0.05]),
    optimizer=st.sampled_from(["adam", "sgd"]),
)
adaptive = st.builds(
    AdaptiveTemperatureParams,
    ratio=st.sampled_from([0.1, 0.5, 0.9]),
    threshold=st.sampled_from([0.0, 0.1, 0.5]),
    min_temperature=st.sampled_from([0.01, 0.3]),
    max_temperature=st.sampled_from([1.0, 2.0]),
)
any_params = st.one_of(st.none(), em_inf, adaptive)
any_method = st.one_of(any_params, st.just(MeasureParams()))
seeds = st.integers(0, 2**31)
# `make test` leaves Triton's interpreter to test_golden.py and test_triton_cuda.py.
each_implementation = pytest.mark.parametrize(
    "implementation",
    [pytest.param(name, marks=pytest.mark.slow if is_interpreted(name) else ()) for name in IMPLEMENTATIONS],
)


@pytest.mark.slow
@settings(max_examples=30)
@given(seeds, st.sampled_from([2, 3, 17, 1000]), st.lists(any_params, min_size=1, max_size=12))
def test_every_row_matches_the_reference(seed: int, vocab: int, params: list[Params | None]) -> None:
    before = rows_of(seed, len(params), vocab)
    results = {name: run(before.clone(), params) for name, run in IMPLEMENTATIONS.items()}
    for row, wanted in enumerate(params):
        if wanted is None:
            for result in results.values():
                assert torch.equal(result.logits[row], before[row])
                assert result.entropy_before[row].isnan()
                assert result.steps[row] == 0
            continue
        z, steps = expected(before[row], wanted)
        on_edge = isinstance(wanted, EMInfParams) and near_threshold(before[row], wanted)
        for result in results.values():
            if not on_edge:
                assert total_variation(result.logits[row].double().numpy(), z) < FLOAT32_DRIFT
                assert result.steps[row] == steps
            assert result.entropy_before[row].item() == pytest.approx(
                reference.entropy(before[row].double().numpy()), abs=1e-5
            )
            assert result.entropy_after[row].item() == pytest.approx(
                reference.entropy(result.logits[row].double().numpy()), abs=1e-4
            )
            assert torch.equal(result.logits[row].isneginf(), before[row].isneginf())


def near_threshold(row: torch.Tensor, params: EMInfParams) -> bool:
    """Return whether rounding to float32 may change the number of steps or the sign of a gradient.

    So it is if an entropy on the way is next to the threshold, or if the row is so flat that its gradients are noise.
    """
    z = row.double().numpy()
    for steps in range(params.steps + 1):
        out, _ = reference.em_inf(z, params.model_copy(update={"steps": steps}))
        p = reference.softmax(out)
        margin = np.log(np.maximum(p, 1e-300)) + reference.entropy(out)
        if abs(reference.entropy(out) - params.threshold) < 1e-5 or np.abs(margin[p > 1e-9]).min() < 1e-5:
            return True
    return False


@each_implementation
@settings(max_examples=10)
@given(seeds, st.lists(any_method, min_size=2, max_size=10), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_the_others(
    implementation: str, seed: int, params: list[Params | None], random
) -> None:  # type: ignore[no-untyped-def]
    before = rows_of(seed, len(params), 257)
    before[::2] = before[::2].bfloat16().float()
    together = IMPLEMENTATIONS[implementation](before.clone(), params)
    order = random.sample(range(len(params)), len(params))
    permuted = IMPLEMENTATIONS[implementation](before[order], [params[i] for i in order])
    assert torch.equal(permuted.logits, together.logits[order])
    assert torch.equal(permuted.steps, together.steps[order])
    for row, wanted in enumerate(params):
        alone = IMPLEMENTATIONS[implementation](before[row : row + 1].clone(), [wanted])
        assert torch.equal(alone.logits[0], together.logits[row])


@each_implementation
@settings(max_examples=12)
@given(seeds, st.one_of(em_inf, adaptive))
def test_argmax_is_kept(implementation: str, seed: int, params: Params) -> None:
    before = rows_of(seed, 4, 300)
    after = IMPLEMENTATIONS[implementation](before.clone(), [params] * 4).logits
    top = before.argmax(1, keepdim=True)
    assert torch.equal(after.gather(1, top), after.amax(1, keepdim=True))


@each_implementation
@settings(max_examples=10)
@given(seeds, st.sampled_from([0.01, 0.05]))
def test_plain_gradient_steps_never_raise_the_entropy(implementation: str, seed: int, rate: float) -> None:
    before = rows_of(seed, 4, 300)
    params = EMInfParams(threshold=0.0, steps=20, learning_rate=rate, kl_weight=0.0, optimizer="sgd")
    result = IMPLEMENTATIONS[implementation](before, [params] * 4)
    assert (result.entropy_after <= result.entropy_before + 1e-5).all()


NO_WORK = {
    "no method": None,
    "no steps": EMInfParams(steps=0, threshold=0.0),
    "entropy below the threshold": EMInfParams(threshold=20.0),
    "entropy below adaptive temperature's threshold": AdaptiveTemperatureParams(threshold=20.0),
}


@each_implementation
@pytest.mark.parametrize("params", NO_WORK.values(), ids=NO_WORK.keys())
def test_a_row_with_nothing_to_do_keeps_every_bit(params: Params | None, implementation: str) -> None:
    before = rows_of(7, 4, 500)
    before[0, :3] = torch.tensor([-0.0, 1e-42, 3e38])  # signed zero, denormal, huge
    params_of_rows = [params, EMInfParams(threshold=0.0), params, params]
    logits = before.clone()
    result = IMPLEMENTATIONS[implementation](logits, params_of_rows)
    idle = [0, 2, 3]
    assert torch.equal(logits[idle].view(torch.int32), before[idle].view(torch.int32))
    assert (result.steps[idle] == 0).all()
    assert not torch.equal(logits[1], before[1])


@each_implementation
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("params", [EMInfParams(threshold=0.0), AdaptiveTemperatureParams(threshold=0.0)])
def test_a_row_with_nan_or_inf_is_left_alone(params: Params, poison: float, implementation: str) -> None:
    before = rows_of(3, 3, 64)
    before[1, 10] = poison
    logits = before.clone()
    result = IMPLEMENTATIONS[implementation](logits, [params] * 3)
    assert torch.equal(logits[1].view(torch.int32), before[1].view(torch.int32))
    assert result.entropy_before.isnan().tolist() == [False, True, False]
    assert result.entropy_after.isnan().tolist() == [False, True, False]
    assert result.steps.tolist() == [result.steps[0].item(), 0, result.steps[2].item()]
    for row in (0, 2):  # its neighbours are as without it
        assert torch.equal(
            logits[row], IMPLEMENTATIONS[implementation](before[row : row + 1].clone(), [params]).logits[0]
        )


@each_implementation
def test_a_row_that_is_only_measured_keeps_every_bit(implementation: str) -> None:
    """Beside rows with and without a method, also if its entropy is above every threshold or cannot be measured."""
    before = rows_of(9, 6, 400)
    before[1, :3] = torch.tensor([-0.0, 1e-42, 3e38])  # signed zero, denormal, huge
    before[4, 10] = NAN
    logits = before.clone()
    measured, em_inf = MeasureParams(), EMInfParams(threshold=0.0)
    result = IMPLEMENTATIONS[implementation](
        logits, [measured, measured, em_inf, None, measured, AdaptiveTemperatureParams(threshold=0.0)]
    )
    untouched = [0, 1, 3, 4]
    assert torch.equal(logits[untouched].view(torch.int32), before[untouched].view(torch.int32))
    assert result.steps.tolist() == [0, 0, 5, 0, 0, 1]
    assert result.entropy_before.isnan().tolist() == [False, False, False, True, True, False]
    for row in (0, 1):
        assert result.entropy_before[row].item() == pytest.approx(
            reference.entropy(before[row].double().numpy()), abs=1e-5
        )
        assert result.entropy_after[row] == result.entropy_before[row]
    for row, params in ((2, em_inf), (5, AdaptiveTemperatureParams(threshold=0.0))):  # its neighbours change nothing
        assert torch.equal(
            logits[row], IMPLEMENTATIONS[implementation](before[row : row + 1].clone(), [params]).logits[0]
        )


@each_implementation
@pytest.mark.parametrize("value", [1.7, 1.75, -0.0])  # off bfloat16's grid, on it
@pytest.mark.parametrize("vocab", [2, 4099])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_uniform_row_is_left_alone(vocab: int, optimizer: str, value: float, implementation: str) -> None:
    before = torch.full((2, vocab), value)
    before[1, 1 : vocab // 2] = -INF
    logits = before.clone()
    IMPLEMENTATIONS[implementation](
        logits, [EMInfParams(threshold=0.0, steps=64, learning_rate=10.0, optimizer=optimizer)] * 2
    )
    assert torch.equal(logits, before)


@each_implementation
@pytest.mark.parametrize("rows", [0, 1, 13, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("vocab", [2, 32_003, 151_936])
def test_all_sizes_match_the_reference(rows: int, vocab: int, implementation: str) -> None:
    """More rows than one chunk of the workspace, real vocabularies; a sample of rows is compared."""
    most_rows, most_logits = (24, 1e5) if is_interpreted(implementation) else (300, 2e7)
    rows = min(rows, most_rows, 1 + int(most_logits / vocab))
    before = rows_of(rows + vocab, rows, vocab, masked=0.05)
    before[::2] = before[::2].bfloat16().float()
    params: list[Params | None] = [(EMInfParams(), AdaptiveTemperatureParams(), None)[i % 3] for i in range(rows)]
    result = IMPLEMENTATIONS[implementation](before.clone(), params)
    assert result.logits.shape == (rows, vocab)
    for row in range(0, rows, max(1, rows // 5)):
        wanted = params[row]
        if wanted is None:
            assert torch.equal(result.logits[row], before[row])
        else:
            z, _ = expected(before[row], wanted)
            assert total_variation(result.logits[row].double().numpy(), z) < FLOAT32_DRIFT


def adversarial(vocab: int) -> dict[str, torch.Tensor]:
    """Return rows by name that have little in common with a language model's."""
    generator = torch.Generator().manual_seed(vocab)
    noise = torch.randn(vocab, generator=generator)
    spike = torch.full((vocab,), -INF)
    spike[vocab // 2] = 3.25
    ties = noise.clone()
    ties[: max(2, vocab // 10)] = 4.4
    return {
        "two tops": torch.cat([torch.tensor([5.1, 5.1]), noise[2:]]),
        "many tops": ties,
        "many tops on bfloat16's grid": ties.bfloat16().float(),
        "one-hot": torch.cat([torch.tensor([60.0]), noise[1:]]),
        "all but one masked": spike,
        "all but two masked": torch.cat([torch.tensor([0.5, 1.0]), torch.full((vocab - 2,), -INF)]),
        "around zero": (noise * 1e-3).bfloat16().float(),
        "extreme spread": noise * 1e4,
        "the ends of float32": torch.cat([torch.tensor([3e38, 2.9e38, -3e38]), noise[3:].clamp(-1, 1) * 1e38]),
        "all negative": noise.bfloat16().float() - 64,
        "float16": (noise * 3).half().float(),
        "a penalty on a few": torch.cat([noise[:3] * 2.1, (noise[3:] * 3).bfloat16().float()]),
        "a penalty on many": torch.cat([noise[: vocab // 3] * 2.1, (noise[vocab // 3 :] * 3).bfloat16().float()]),
        "nearly uniform": noise.bfloat16().float() * 0.125,
    }


METHODS: list[Params] = [
    EMInfParams(threshold=0.0),
    EMInfParams(threshold=0.0, steps=33, learning_rate=0.03, kl_weight=0.0),
    EMInfParams(threshold=0.2, steps=15, optimizer="sgd", learning_rate=0.5, kl_weight=0.05),
    AdaptiveTemperatureParams(threshold=0.0),
    AdaptiveTemperatureParams(ratio=0.9, threshold=0.0, max_temperature=5.0),
]


@each_implementation
@pytest.mark.parametrize("vocab", [5, 50, 4097])
def test_adversarial_rows_match_the_reference(vocab: int, implementation: str) -> None:
    rows = adversarial(vocab)
    methods = METHODS[:1] if is_interpreted(implementation) and vocab < 4097 else METHODS
    for params in methods:
        before = torch.stack(list(rows.values()))
        result = IMPLEMENTATIONS[implementation](before.clone(), [params] * len(rows))
        for index, name in enumerate(rows):
            z, _ = expected(before[index], params)
            after = result.logits[index]
            case = f"{name}, {params}"
            assert total_variation(after.double().numpy(), z) < FLOAT32_DRIFT, case
            assert torch.equal(after.isneginf(), before[index].isneginf()), case
            assert result.entropy_before[index].item() == pytest.approx(
                reference.entropy(before[index].double().numpy()), abs=1e-5
            ), case
            assert result.entropy_after[index].item() == pytest.approx(reference.entropy(z), abs=2e-4), case


@each_implementation
@pytest.mark.parametrize("origin", ["bfloat16", "float32", "mixed"])
def test_thresholds_are_hit_at_different_steps(origin: str, implementation: str) -> None:
    before = rows_of(31, 24, 1500, masked=0.05)
    if origin != "float32":
        before = before.bfloat16().float()
    if origin == "mixed":
        before[:, 100:103] /= 1.1
    entropies = [reference.entropy(row) for row in before.double().numpy()]
    # Each row's threshold is a little below its entropy: some rows reach it in one step, some never.
    params: list[Params | None] = [
        EMInfParams(threshold=h * (0.99 - 0.03 * (i % 8)), steps=30) for i, h in enumerate(entropies)
    ]
    result = IMPLEMENTATIONS[implementation](before.clone(), params)
    wanted = [expected(row, p)[1] for row, p in zip(before, params, strict=True) if p]
    assert result.steps.tolist() == wanted
    assert len(set(wanted)) > 5


@each_implementation
@pytest.mark.parametrize(("vocab", "width"), [(601, 700), (601, 704), (608, 701)])
def test_rows_may_lie_apart_in_memory(vocab: int, width: int, implementation: str) -> None:
    """As after vLLM has sliced the padding off its vocabulary."""
    padded = rows_of(17, 6, width)
    kept = padded.clone()
    params: list[Params | None] = [EMInfParams(), AdaptiveTemperatureParams(), None] * 2
    alone = IMPLEMENTATIONS[implementation](padded[:, :vocab].clone(), params).logits.clone()
    IMPLEMENTATIONS[implementation](padded[:, :vocab], params)
    # Aligned rows run other code of Triton's, which adds in another order.
    if implementation == "triton_cuda" and 0 in (vocab % 16, width % 16):
        torch.testing.assert_close(padded[:, :vocab], alone)
    else:
        assert torch.equal(padded[:, :vocab], alone)
    assert torch.equal(padded[:, vocab:], kept[:, vocab:])


@each_implementation
def test_a_wide_temperature_range_is_searched_to_the_end(implementation: str) -> None:
    before = rows_of(11, 6, 500, masked=0.0)
    params = AdaptiveTemperatureParams(ratio=0.05, threshold=0.0, min_temperature=0.001, max_temperature=10.0)
    before[3:] = before[3:].bfloat16().float()
    after = IMPLEMENTATIONS[implementation](before.clone(), [params] * 6).logits
    for row in range(6):
        t = reference.temperature(before[row].double().numpy(), params)
        assert (before[row] / after[row]).mean().item() == pytest.approx(t, rel=1e-3)


@each_implementation
def test_targets_out_of_reach_end_at_the_bounds(implementation: str) -> None:
    two_tops = torch.tensor([[5.0, 5.0, 0.0, 0.0]])  # never below ln 2 nats
    cold = IMPLEMENTATIONS[implementation](
        two_tops.clone(), [AdaptiveTemperatureParams(ratio=0.1, threshold=0.0, min_temperature=0.05)]
    )
    assert cold.logits[0, 0].item() == pytest.approx(5.0 / 0.05, rel=1e-3)
    hot = AdaptiveTemperatureParams(ratio=1.0, threshold=0.0, max_temperature=1.0)
    assert IMPLEMENTATIONS[implementation](two_tops.clone(), [hot]).logits[0, 0].item() == pytest.approx(5.0, rel=1e-3)
