"""The methods that remove tokens, in every implementation, against the reference."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TopHLogitsWarper

from em_sampler.params import (
    CUT,
    EMInfParams,
    GreedyBelowParams,
    MeasureParams,
    Params,
    PLessParams,
    TopHParams,
    TopNSigmaParams,
    TruncationParams,
)
from em_sampler.transforms import reference
from em_sampler.transforms.batch import TransformOutput
from tests.em_sampler.transforms.support import IMPLEMENTATIONS, Row, rows_of
from tests.em_sampler.transforms.test_implementations import adversarial, each_implementation

Kept = npt.NDArray[np.bool_]  # [vocab]

# Relative. A token that is next to the bound by less may stay or go: logits and sums were rounded to float32.
ROUNDING = 1e-5
NEVER = 1e-30  # a token with less probability may stay or go, too: no sampler would notice

METHODS: dict[str, TruncationParams] = {
    "p_less": PLessParams(),
    "p_less, normalized": PLessParams(normalized=True),
    "top_h": TopHParams(),
    "top_h, 0.9": TopHParams(alpha=0.9),
    "top_h, 1": TopHParams(alpha=1),
    "top_n_sigma": TopNSigmaParams(),
    "top_n_sigma, 3": TopNSigmaParams(n=3),
    "greedy_below": GreedyBelowParams(),
    "greedy_below, 1": GreedyBelowParams(p_max=1),
}
# What loosens a method: a higher or a lower value of this param.
LOOSENED_BY = {TopHParams: ("alpha", 1), TopNSigmaParams: ("n", 1), GreedyBelowParams: ("p_max", -1)}
each_method = pytest.mark.parametrize("params", METHODS.values(), ids=METHODS.keys())


def must_and_may_stay(row: Row, params: TruncationParams, temperature: float) -> tuple[Kept, Kept]:
    """Return which tokens of a row have to be kept, and which may be."""
    p = reference.softmax(row / temperature)
    if isinstance(params, PLessParams):
        words, collision = np.isfinite(row).sum(), (p**2).sum()
        bound = (words * collision - 1) / max(words - 1, 1) if params.normalized else collision
        must, may = (p >= bound + factor * collision for factor in (ROUNDING, -ROUNDING))
    else:
        field, sign = {TopHParams: ("alpha", 1), TopNSigmaParams: ("n", 1), GreedyBelowParams: ("p_max", -1)}[
            type(params)
        ]
        must, may = (
            reference.kept(row, params.model_copy(update={field: getattr(params, field) * (1 + factor)}), temperature)
            for factor in (-sign * ROUNDING, sign * ROUNDING)
        )
    return must & (p >= NEVER) | (row == row.max()), (may | (p < NEVER)) & np.isfinite(row)


def check(before: torch.Tensor, result: TransformOutput, index: int, params: TruncationParams, t: float) -> None:
    """Check what became of row `index`, which was `before` [vocab]."""
    row, after = before.double().numpy(), result.logits[index]
    kept = ~after.isneginf().numpy()
    must, may = must_and_may_stay(row, params, t)
    case = f"row {index}, {params}, temperature {t}"
    assert not (must & ~kept).any(), case
    assert not (kept & ~may).any(), case
    assert torch.equal(after[kept].view(torch.int32), before[kept].view(torch.int32))
    was_cut = bool((kept != np.isfinite(row)).any())
    assert result.steps[index] == (CUT if was_cut else 0)
    assert result.entropy_before[index].item() == pytest.approx(reference.entropy(row), abs=1e-5)
    assert result.entropy_after[index].item() == pytest.approx(reference.entropy(after.double().numpy()), abs=1e-4)


@each_implementation
@each_method
@pytest.mark.parametrize("vocab", [5, 50, 4097])
def test_adversarial_rows_match_the_reference(vocab: int, params: TruncationParams, implementation: str) -> None:
    before = torch.stack(list(adversarial(vocab).values()))
    temperatures = [(1.0, 0.25, 2.0)[index % 3] for index in range(len(before))]
    result = IMPLEMENTATIONS[implementation](before.clone(), [params] * len(before), temperatures)
    for index, temperature in enumerate(temperatures):
        check(before[index], result, index, params, temperature)


@pytest.mark.slow
@settings(max_examples=30)
@given(
    st.integers(0, 2**31),
    st.sampled_from([2, 3, 17, 1000, 9000]),
    st.lists(st.sampled_from([*METHODS.values()]), min_size=1, max_size=9),
    st.sampled_from([0.01, 0.3, 1.0, 2.0]),
    st.booleans(),
)
def test_every_row_matches_the_reference(
    seed: int, vocab: int, params: list[TruncationParams], temperature: float, on_grid: bool
) -> None:
    before = rows_of(seed, len(params), vocab)
    before = before.bfloat16().float() if on_grid else before
    for run in IMPLEMENTATIONS.values():
        result = run(before.clone(), params, [temperature] * len(params))
        for index, wanted in enumerate(params):
            check(before[index], result, index, wanted, temperature)


@each_implementation
def test_all_methods_share_a_batch(implementation: str) -> None:
    """A row does not depend on its neighbours, whatever their methods and temperatures."""
    mixed: list[Params | None] = [*METHODS.values(), None, MeasureParams(), EMInfParams(threshold=0.0)]
    before = rows_of(5, len(mixed), 5000, masked=0.1)
    before[::2] = before[::2].bfloat16().float()
    temperatures = [0.5 + 0.1 * index for index in range(len(mixed))]
    run = IMPLEMENTATIONS[implementation]
    together = run(before.clone(), mixed, temperatures)
    for index, params in enumerate(mixed):
        alone = run(before[index : index + 1].clone(), [params], temperatures[index : index + 1])
        assert torch.equal(alone.logits[0].view(torch.int32), together.logits[index].view(torch.int32))
        assert torch.equal(alone.stats[:, 0], together.stats[:, index])
        if isinstance(params, TruncationParams):
            check(before[index], together, index, params, temperatures[index])


@each_implementation
@each_method
def test_a_greedy_row_is_measured_and_keeps_every_bit(params: TruncationParams, implementation: str) -> None:
    before = rows_of(2, 2, 300)
    result = IMPLEMENTATIONS[implementation](before.clone(), [params] * 2, [0.0, 1.0])
    assert torch.equal(result.logits[0], before[0])
    assert result.steps[0] == 0
    assert result.entropy_before[0].item() == pytest.approx(reference.entropy(before[0].double().numpy()), abs=1e-5)


@each_implementation
@each_method
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_with_nan_or_inf_is_left_alone(poison: float, params: TruncationParams, implementation: str) -> None:
    before = rows_of(3, 3, 64)
    before[1, 10] = poison
    result = IMPLEMENTATIONS[implementation](before.clone(), [params] * 3)
    assert torch.equal(result.logits[1].view(torch.int32), before[1].view(torch.int32))
    assert result.steps[1] == 0
    assert result.entropy_after.isnan().tolist() == [False, True, False]
    for index in (0, 2):
        check(before[index], result, index, params, 1.0)


def limits_that_agree(row: Row) -> list[tuple[int, float]]:
    """Return (number of tokens, alpha) for which top_h as published and as in `transformers` keep so many tokens.

    Both compare a number of each prefix of the sorted tokens with alpha * H, and both numbers rise with the length: the
    prefix's entropy, renormalised, and its share -sum p log p of the row's entropy. So if alpha * H lies above both
    numbers of k tokens and below both numbers of k + 1, each definition keeps k tokens. There are two such alphas for
    each k that has any, at the ends of their range.
    """
    p = -np.sort(-reference.softmax(row))
    shares, total = np.cumsum(-p * np.log(p)), np.cumsum(p)
    entropies = np.log(total) + shares / total
    agreed = []
    for k in range(1, int((p > 1e-4).sum())):
        low, high = (each(entropies[j], shares[j]) for each, j in ((max, k - 1), (min, k)))
        ends = low + (high - low) * 0.02, low + (high - low) * 0.98
        agreed += [(k, float(end / shares[-1])) for end in ends if high > low * 1.01]
    return agreed


@each_implementation
def test_top_h_keeps_the_tokens_that_transformers_keeps_if_the_definitions_agree(implementation: str) -> None:
    """`transformers` looks at a hundred tokens: the others have 1e-15 of the probability here, less than rounding."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(20, 300, generator=generator) - 45
    steps = torch.rand(20, 40, generator=generator) * torch.linspace(0.8, 3, 20)[:, None]
    rows[:, 50:90] = steps - steps.cumsum(-1)  # the highest is 0
    cases = [(row, *each) for row in rows for each in limits_that_agree(row.double().numpy())]
    before = torch.stack([row for row, _, _ in cases])
    after = IMPLEMENTATIONS[implementation](before.clone(), [TopHParams(alpha=alpha) for _, _, alpha in cases]).logits
    assert len(cases) > 100 and len({k for _, k, _ in cases}) > 4
    for got, (row, k, alpha) in zip(after, cases, strict=True):
        theirs = TopHLogitsWarper(alpha)(torch.empty(1, 0, dtype=torch.long), row[None])[0]  # type: ignore[arg-type]
        assert torch.equal(got, theirs), (k, alpha)
        assert got.isfinite().sum() == k


@each_implementation
def test_tokens_as_likely_as_the_least_likely_one_stay(implementation: str) -> None:
    """Half of a hundred equal tokens would be enough for top_h; none is better than another."""
    before = torch.full((2, 200), -5.0)
    before[:, :100] = 1.0
    params = TopHParams(alpha=0.8), TopHParams(alpha=0.99)
    result = IMPLEMENTATIONS[implementation](before.clone(), params)
    assert [int(row.isfinite().sum()) for row in result.logits] == [100, 100]


@each_implementation
@pytest.mark.parametrize("stats", ["none", "summary"])
def test_the_varentropy_is_measured_for_requests_that_want_stats(stats: str, implementation: str) -> None:
    before = rows_of(11, 3, 3000)
    everything: list[Params] = [
        EMInfParams(threshold=0.0, stats=stats), MeasureParams(stats=stats), PLessParams(stats=stats)  # type: ignore[arg-type]
    ]  # fmt: skip
    result = IMPLEMENTATIONS[implementation](before.clone(), everything)
    for row, varentropy in zip(before.double().numpy(), result.varentropy.tolist(), strict=True):
        wanted = reference.varentropy(row) if stats == "summary" else math.nan
        assert varentropy == pytest.approx(wanted, rel=1e-3, abs=1e-4, nan_ok=True)
