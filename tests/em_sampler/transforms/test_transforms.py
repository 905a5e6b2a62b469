"""Every implementation of the transform: its properties, and its agreement with the oracle where golden vectors do not
reach."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from em_sampler import AdaptiveTemperatureParams, EMInfParams, transform
from em_sampler.params import MeasureParams, Params
from em_sampler.transforms import reference
from em_sampler.transforms.batch import NO_METHOD, BatchParams
from em_sampler.transforms.eager import EagerTransform
from tests.em_sampler.transforms.support import FORMS, expected, total_variation, transform_masked

NAN, INF = math.nan, math.inf
# Total variation between float32 and the oracle's float64 after as many steps as here; the worst found was 2.4e-5.
FLOAT32_DRIFT = 1e-4

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


def rows_of(seed: int, count: int, vocab: int, masked: float = 0.2) -> torch.Tensor:
    """Rows from sharp to flat, some with forbidden tokens, the first always with at least two allowed."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(count, 1, generator=generator) * 6 + 0.1
    logits = torch.randn(count, vocab, generator=generator) * scale
    logits[:, 2:][torch.rand(count, vocab - 2, generator=generator) < masked] = -INF
    return logits


@settings(max_examples=80, deadline=None)
@given(seeds, st.sampled_from([2, 3, 17, 1000]), st.lists(any_params, min_size=1, max_size=12))
def test_every_row_matches_the_oracle(seed: int, vocab: int, params: list[Params | None]) -> None:
    before = rows_of(seed, len(params), vocab)
    results = {name: form(before.clone(), params) for name, form in FORMS.items()}
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
    """Whether an entropy along the way is so close to the threshold that float32 may stop a step apart, or the row is
    so flat that the sign of its gradients is rounding noise."""
    z = row.double().numpy()
    for steps in range(params.steps + 1):
        out, _ = reference.em_inf(z, params.model_copy(update={"steps": steps}))
        p = reference.softmax(out)
        margin = np.log(np.maximum(p, 1e-300)) + reference.entropy(out)
        if abs(reference.entropy(out) - params.threshold) < 1e-5 or np.abs(margin[p > 1e-9]).min() < 1e-5:
            return True
    return False


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=10, deadline=None)
@given(seeds, st.lists(any_method, min_size=2, max_size=10), st.randoms(use_true_random=False))
def test_rows_do_not_see_each_other(form: str, seed: int, params: list[Params | None], random) -> None:  # type: ignore[no-untyped-def]
    before = rows_of(seed, len(params), 257)
    before[::2] = before[::2].bfloat16().float()
    together = FORMS[form](before.clone(), params)
    order = random.sample(range(len(params)), len(params))
    permuted = FORMS[form](before[order], [params[i] for i in order])
    assert torch.equal(permuted.logits, together.logits[order])
    assert torch.equal(permuted.steps, together.steps[order])
    for row, wanted in enumerate(params):
        alone = FORMS[form](before[row : row + 1].clone(), [wanted])
        assert torch.equal(alone.logits[0], together.logits[row])


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=12, deadline=None)
@given(seeds, st.one_of(em_inf, adaptive))
def test_argmax_is_kept(form: str, seed: int, params: Params) -> None:
    before = rows_of(seed, 8, 300)
    after = FORMS[form](before.clone(), [params] * 8).logits
    top = before.argmax(1, keepdim=True)
    assert torch.equal(after.gather(1, top), after.amax(1, keepdim=True))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=10, deadline=None)
@given(seeds, st.sampled_from([0.01, 0.05]))
def test_plain_gradient_steps_never_raise_the_entropy(form: str, seed: int, rate: float) -> None:
    before = rows_of(seed, 8, 300)
    params = EMInfParams(threshold=0.0, steps=20, learning_rate=rate, kl_weight=0.0, optimizer="sgd")
    result = FORMS[form](before, [params] * 8)
    assert (result.entropy_after <= result.entropy_before + 1e-5).all()


NO_WORK = {
    "no method": None,
    "no steps": EMInfParams(steps=0, threshold=0.0),
    "entropy below the threshold": EMInfParams(threshold=20.0),
    "entropy below adaptive temperature's threshold": AdaptiveTemperatureParams(threshold=20.0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("params", NO_WORK.values(), ids=NO_WORK.keys())
def test_no_work_keeps_every_bit(params: Params | None, form: str) -> None:
    before = rows_of(7, 4, 500)
    before[0, :3] = torch.tensor([-0.0, 1e-42, 3e38])  # signed zero, denormal, huge
    worked = [params, EMInfParams(threshold=0.0), params, params]
    logits = before.clone()
    result = FORMS[form](logits, worked)
    idle = [0, 2, 3]
    assert torch.equal(logits[idle].view(torch.int32), before[idle].view(torch.int32))
    assert (result.steps[idle] == 0).all()
    assert not torch.equal(logits[1], before[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("params", [EMInfParams(threshold=0.0), AdaptiveTemperatureParams(threshold=0.0)])
def test_a_row_with_nan_or_inf_passes_through(params: Params, poison: float, form: str) -> None:
    before = rows_of(3, 3, 64)
    before[1, 10] = poison
    logits = before.clone()
    result = FORMS[form](logits, [params] * 3)
    assert torch.equal(logits[1].view(torch.int32), before[1].view(torch.int32))
    assert result.entropy_before.isnan().tolist() == [False, True, False]
    assert result.entropy_after.isnan().tolist() == [False, True, False]
    assert result.steps.tolist() == [result.steps[0].item(), 0, result.steps[2].item()]
    for row in (0, 2):  # its neighbours are as without it
        assert torch.equal(logits[row], FORMS[form](before[row : row + 1].clone(), [params]).logits[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_only_measured_keeps_every_bit(form: str) -> None:
    """Among rows with work and without, also where its entropy is above every threshold, or cannot be measured."""
    before = rows_of(9, 6, 400)
    before[1, :3] = torch.tensor([-0.0, 1e-42, 3e38])  # signed zero, denormal, huge
    before[4, 10] = NAN
    logits = before.clone()
    measured, em_inf = MeasureParams(), EMInfParams(threshold=0.0)
    result = FORMS[form](logits, [measured, measured, em_inf, None, measured, AdaptiveTemperatureParams(threshold=0.0)])
    untouched = [0, 1, 3, 4]
    assert torch.equal(logits[untouched].view(torch.int32), before[untouched].view(torch.int32))
    assert result.steps.tolist() == [0, 0, 5, 0, 0, 1]
    assert result.entropy_before.isnan().tolist() == [False, False, False, True, True, False]
    for row in (0, 1):
        assert result.entropy_before[row].item() == pytest.approx(
            reference.entropy(before[row].double().numpy()), abs=1e-5
        )
        assert result.entropy_after[row] == result.entropy_before[row]
    for row, params in ((2, em_inf), (5, AdaptiveTemperatureParams(threshold=0.0))):  # not disturbed by its neighbours
        assert torch.equal(logits[row], FORMS[form](before[row : row + 1].clone(), [params]).logits[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [1.7, 1.75, -0.0])  # off bfloat16's grid, on it
@pytest.mark.parametrize("vocab", [2, 4099])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_uniform_row_is_left_alone(vocab: int, optimizer: str, value: float, form: str) -> None:
    before = torch.full((2, vocab), value)
    before[1, 1 : vocab // 2] = -INF
    logits = before.clone()
    FORMS[form](logits, [EMInfParams(threshold=0.0, steps=64, learning_rate=10.0, optimizer=optimizer)] * 2)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [0, 1, 13, 300])
@pytest.mark.parametrize("vocab", [2, 32_003, 151_936])
def test_sizes(rows: int, vocab: int, form: str) -> None:
    """More rows than one chunk of the workspace, real vocabularies; a sample of rows is held to the oracle."""
    most = 8e5 if form == "fused" else 2e7  # an interpreter is slow
    if rows * vocab > most:
        rows = int(most / vocab)
    before = rows_of(rows + vocab, rows, vocab, masked=0.05)
    before[::2] = before[::2].bfloat16().float()
    params: list[Params | None] = [(EMInfParams(), AdaptiveTemperatureParams(), None)[i % 3] for i in range(rows)]
    result = FORMS[form](before.clone(), params)
    assert result.logits.shape == (rows, vocab)
    for row in range(0, rows, max(1, rows // 5)):
        wanted = params[row]
        if wanted is None:
            assert torch.equal(result.logits[row], before[row])
        else:
            z, _ = expected(before[row], wanted)
            assert total_variation(result.logits[row].double().numpy(), z) < FLOAT32_DRIFT


def adversarial(vocab: int) -> dict[str, torch.Tensor]:
    """Rows that have little in common with a language model's."""
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocab", [5, 50, 4097])
def test_adversarial_rows(vocab: int, form: str) -> None:
    rows = adversarial(vocab)
    for params in METHODS:
        before = torch.stack(list(rows.values()))
        result = FORMS[form](before.clone(), [params] * len(rows))
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("origin", ["bfloat16", "float32", "mixed"])
def test_thresholds_are_hit_at_different_steps(origin: str, form: str) -> None:
    before = rows_of(31, 24, 1500, masked=0.05)
    if origin != "float32":
        before = before.bfloat16().float()
    if origin == "mixed":
        before[:, 100:103] /= 1.1
    entropies = [reference.entropy(row) for row in before.double().numpy()]
    # Each row's threshold lies a little below its entropy, so that some are reached in a step and some never.
    params: list[Params | None] = [
        EMInfParams(threshold=h * (0.99 - 0.03 * (i % 8)), steps=30) for i, h in enumerate(entropies)
    ]
    result = FORMS[form](before.clone(), params)
    wanted = [expected(row, p)[1] for row, p in zip(before, params, strict=True) if p]
    assert result.steps.tolist() == wanted
    assert len(set(wanted)) > 5


@pytest.mark.parametrize("form", FORMS)
def test_rows_may_lie_apart(form: str) -> None:
    """vLLM cuts the padding off its vocabulary: rows of the tensor are then not next to each other."""
    padded = rows_of(17, 6, 700)
    kept = padded.clone()
    params: list[Params | None] = [EMInfParams(), AdaptiveTemperatureParams(), None] * 2
    alone = FORMS[form](padded[:, :601].clone(), params).logits.clone()
    FORMS[form](padded[:, :601], params)
    assert torch.equal(padded[:, :601], alone)
    assert torch.equal(padded[:, 601:], kept[:, 601:])


@pytest.mark.parametrize("form", FORMS)
def test_wide_temperature_range_is_searched_to_the_end(form: str) -> None:
    before = rows_of(11, 6, 500, masked=0.0)
    params = AdaptiveTemperatureParams(ratio=0.05, threshold=0.0, min_temperature=0.001, max_temperature=10.0)
    before[3:] = before[3:].bfloat16().float()
    after = FORMS[form](before.clone(), [params] * 6).logits
    for row in range(6):
        t = reference.temperature(before[row].double().numpy(), params)
        assert (before[row] / after[row]).mean().item() == pytest.approx(t, rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_out_of_reach_targets_end_at_the_bounds(form: str) -> None:
    two_tops = torch.tensor([[5.0, 5.0, 0.0, 0.0]])  # never below ln 2 nats
    cold = FORMS[form](two_tops.clone(), [AdaptiveTemperatureParams(ratio=0.1, threshold=0.0, min_temperature=0.05)])
    assert cold.logits[0, 0].item() == pytest.approx(5.0 / 0.05, rel=1e-3)
    hot = AdaptiveTemperatureParams(ratio=1.0, threshold=0.0, max_temperature=1.0)
    assert FORMS[form](two_tops.clone(), [hot]).logits[0, 0].item() == pytest.approx(5.0, rel=1e-3)


def test_the_workspace_is_all_that_is_kept() -> None:
    engine = EagerTransform(1000, torch.device("cpu"), max_rows=4)
    before = rows_of(5, 20, 1000)  # five chunks
    first, second = before.clone(), before.clone()
    params = BatchParams.of([EMInfParams(), AdaptiveTemperatureParams()] * 10)
    engine(first, params)
    engine(rows_of(6, 20, 1000), params)
    engine(second, params)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("logits", "count", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), 2, "float32, got .*float64"),
        (torch.zeros(3), 1, r"\[rows, vocab\]"),
        (torch.zeros(2, 3), 3, "got 3 for 2 rows"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(logits: torch.Tensor, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transform(logits, [None] * count)


def test_a_row_of_none_has_no_method() -> None:
    assert (BatchParams.of([None, None]).values[:, 0] == NO_METHOD).all()
    assert BatchParams.of([None]).max_steps is None
    assert not BatchParams.of([None]).any_adaptive


def test_the_masked_form_and_the_compact_form_agree() -> None:
    before = rows_of(21, 30, 999)
    before[4, 4] = NAN
    params = [EMInfParams(steps=9), None, AdaptiveTemperatureParams(), EMInfParams(optimizer="sgd")] * 7 + [None] * 2
    compact, masked = transform(before.clone(), params), transform_masked(before.clone(), params)
    for one, other in zip(compact, masked, strict=True):
        assert torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0))
