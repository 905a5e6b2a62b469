"""The sampler inside both of vLLM's runners: every request gets its method, whatever else is in the batch."""

from typing import Any

import numpy as np
import pytest

from em_sampler.transforms import reference
from tests.em_sampler.transforms.support import p_value
from tests.engine.launch import Server, offline
from tests.engine.support import (
    ADAPTIVE,
    ALL_LOGPROBS,
    EM,
    STRONG,
    UNSURE,
    complete,
    logprob_rows,
    tokens,
    transformed_row,
)

pytestmark = pytest.mark.engine

# Leaves only the top token, as STRONG does.
COLD = {"method": "adaptive_temperature", "ratio": 0.0, "threshold": 0.0, "min_temperature": 0.001}
PROMPTS = [f"<|user|>{question}<|im_end|><|assistant|>" for question in ("58+17*3-29", "7*8-9", "91-45+6*7", "3+4")]
FULL_ROW = {"prompt": UNSURE, "max_tokens": 1, "seed": 2} | ALL_LOGPROBS


def test_without_em_inf_the_tokens_are_those_of_plain_vllm(engine: Server) -> None:
    bodies = [{"prompt": p, "seed": i, "temperature": 1.0, "max_tokens": 12} for i, p in enumerate(PROMPTS)]
    responses = complete(engine, *bodies, one_by_one=True)
    requests = [{"prompt": b["prompt"], "params": {k: b[k] for k in b if k != "prompt"}} for b in bodies]
    plain, _ = offline(requests, engine.runner)
    assert [tokens(r) for r in responses] == plain


@pytest.mark.essential
def test_sampled_frequencies_match_the_reference(engine: Server) -> None:
    """One position, many seeds, four distributions sampled in one mixed batch."""
    configs: list[tuple[Any, float]] = [(None, 1.0), (EM, 1.0), (EM, 2.0), (ADAPTIVE, 1.0)]  # em_inf, temperature
    check_frequencies(engine, configs)


def test_sampled_frequencies_match_the_reference_if_tokens_are_removed(engine: Server) -> None:
    """At temperature 2 the methods keep other tokens than at 1."""
    configs: list[tuple[Any, float]] = [
        ({"method": "top_h", "alpha": 0.6}, 2.0),
        ({"method": "top_n_sigma", "n": 1.5}, 2.0),
        ({"method": "p_less"}, 2.0),
        ({"method": "greedy_below", "p_max": 0.9}, 2.0),
    ]
    check_frequencies(engine, configs)


def check_frequencies(engine: Server, configs: list[tuple[Any, float]]) -> None:
    """Check the tokens sampled by each (em_inf, temperature) of a mixed batch by chi-square; tell all of them apart."""
    logprobs = logprob_rows(complete(engine, FULL_ROW)[0]["choices"][0])[0]
    assert reference.entropy(logprobs) > 0.7, "the model is too sure of the next token for this test"
    rounds, n = (8, 100) if engine.runner == "v1" else (1, 150)
    shared = {"prompt": UNSURE, "max_tokens": 1, "n": n}
    bodies = [
        shared | {"temperature": t, "seed": 1000 * r + 100_000 * a} | ({"em_inf": em} if em else {})
        for r in range(rounds)
        for a, (em, t) in enumerate(configs)
    ]
    responses = complete(engine, *bodies)
    for a, (em, t) in enumerate(configs):
        sampled = [tokens(response, choice)[0] for response in responses[a :: len(configs)] for choice in range(n)]
        counts = np.bincount(sampled, minlength=len(logprobs))
        assert counts.sum() == rounds * n
        expected = reference.softmax(transformed_row(logprobs, em, t) / t)
        assert p_value(counts, expected) > 1e-4, (em, t)
        others = [reference.softmax(transformed_row(logprobs, e, u) / u) for e, u in configs if (e, u) != (em, t)]
        assert max(p_value(counts, other) for other in others) < 1e-4, "too few samples to tell the distributions apart"


def test_requests_in_a_mixed_batch_sample_the_same_tokens_as_alone(engine: Server) -> None:
    methods: list[Any] = [EM, None, ADAPTIVE, EM | {"optimizer": "sgd", "learning_rate": 2.0}, {"method": "top_h"}]
    for round_ in range(3 if engine.runner == "v1" else 1):
        bodies = [
            {"prompt": PROMPTS[i % 4], "seed": 10 * round_ + i, "temperature": 1.5, "max_tokens": 5 + 3 * i}
            | {"ignore_eos": True}
            | ({"em_inf": em} if em else {})
            for i, em in enumerate(methods)
        ]
        alone = complete(engine, *bodies, one_by_one=True)
        together = complete(engine, *bodies)
        assert [tokens(r) for r in together] == [tokens(r) for r in alone]


def test_methods_reach_the_rows_of_their_requests_under_pressure(engine: Server) -> None:
    """Requests come and go, long prompts are prefilled in chunks, and the cache is too small for all.

    Two methods leave only the top token: their requests are greedy at any temperature, and plain requests are not.
    """
    methods: list[Any] = [STRONG, None, COLD, False]
    # Many prompts in each request, so that they wait inside the engine: the cache runs out, however fast the machine.
    prompts = ["Q" * (70 * (i % 3)) + UNSURE for i in range(12 if engine.runner == "v1" else 3)]
    bodies = [
        {"prompt": prompts, "max_tokens": 16 + 11 * i, "ignore_eos": True} | ({} if em is None else {"em_inf": em})
        for i, em in enumerate(methods)
    ]
    greedy = complete(engine, *[body | {"temperature": 0} for body in bodies])
    preempted = engine.metric("vllm:num_preemptions_total")
    responses = complete(engine, *[body | {"temperature": 2.0} for body in bodies])
    assert engine.metric("vllm:num_preemptions_total") > preempted, "no request was preempted"
    for em, response, expected in zip(methods, responses, greedy, strict=True):
        is_greedy = [tokens(response, i) == tokens(expected, i) for i in range(len(prompts))]
        assert is_greedy == [em in (STRONG, COLD)] * len(prompts)


@pytest.mark.essential
def test_greedy_requests_keep_their_tokens(engine: Server) -> None:
    shared = {"prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0.0}
    plain, *minimised = complete(engine, shared, shared | {"em_inf": STRONG}, shared | {"em_inf": ADAPTIVE})
    assert [tokens(r) for r in minimised] == [tokens(plain)] * 2


@pytest.mark.essential
def test_n_samples_share_the_method_and_differ(engine: Server) -> None:
    shared = {"prompt": UNSURE, "max_tokens": 8, "n": 4, "seed": 1, "ignore_eos": True, "temperature": 1.5}
    strong, mild = complete(engine, shared | {"em_inf": STRONG}, shared | {"em_inf": {"steps": 1}})
    assert len({tuple(tokens(strong, i)) for i in range(4)}) == 1
    assert len({tuple(tokens(mild, i)) for i in range(4)}) > 1


def test_forbidden_tokens_stay_forbidden(engine: Server) -> None:
    """The sampler sees a grammar's mask as -inf, and logits with the logit bias added."""
    responses = complete(
        engine,
        {"prompt": UNSURE, "max_tokens": 12, "em_inf": STRONG, "structured_outputs": {"regex": "[xyz]{6}"}},
        {"prompt": UNSURE, "max_tokens": 3, "em_inf": STRONG, "logit_bias": {"50": 100}},
    )
    assert len(responses[0]["choices"][0]["text"]) == 6
    assert set(responses[0]["choices"][0]["text"]) <= set("xyz")
    assert tokens(responses[1]) == [50] * 3


@pytest.mark.essential
def test_a_reused_slot_keeps_nothing_of_its_last_request(engine: Server) -> None:
    shared = {"prompt": PROMPTS[1], "max_tokens": 8, "ignore_eos": True, "temperature": 2.0, "seed": 11}
    before = tokens(complete(engine, shared)[0])
    for _ in range(3):  # together more requests than slots
        complete(engine, *[shared | {"em_inf": STRONG, "max_tokens": 1}] * 8)
    assert tokens(complete(engine, shared)[0]) == before


def test_reported_logprobs_are_the_models(engine: Server) -> None:
    """By default vLLM reports raw log-probabilities, which EM-INF does not change."""
    plain, minimised = complete(engine, FULL_ROW, FULL_ROW | {"em_inf": STRONG}, one_by_one=True)
    before, after = (logprob_rows(response["choices"][0]) for response in (plain, minimised))
    assert np.allclose(before, after, atol=1e-5)
