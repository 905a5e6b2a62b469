"""The sampler inside both of vLLM's runners: every request gets its own method, whatever else is in the batch."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from em_sampler.params import parse_params
from em_sampler.transforms import reference
from tests.engine.launch import Server, offline
from tests.engine.support import ADAPTIVE, EM, STRONG, UNSURE, VOCABULARY, complete, tokens

pytestmark = pytest.mark.engine

COLD = {"method": "adaptive_temperature", "ratio": 0.0, "threshold": 0.0, "min_temperature": 0.001}  # the same
PROMPTS = [f"<|user|>{question}<|im_end|><|assistant|>" for question in ("58+17*3-29", "7*8-9", "91-45+6*7", "3+4")]
FULL_ROW = {"prompt": UNSURE, "max_tokens": 1, "seed": 2, "logprobs": VOCABULARY, "return_tokens_as_token_ids": True}


def test_without_em_inf_the_tokens_are_those_of_plain_vllm(engine: Server) -> None:
    bodies = [{"prompt": p, "seed": i, "temperature": 1.0, "max_tokens": 12} for i, p in enumerate(PROMPTS)]
    answers = complete(engine, *bodies, one_by_one=True)
    requests = [{"prompt": b["prompt"], "params": {k: b[k] for k in b if k != "prompt"}} for b in bodies]
    assert [tokens(a) for a in answers] == offline(requests, engine.runner, with_plugin=False)


def test_sampled_frequencies_are_the_oracles(engine: Server) -> None:
    """One position, many seeds, four distributions drawn in one mixed batch."""
    logprobs = full_row(complete(engine, FULL_ROW)[0])
    assert reference.entropy(logprobs) > 0.7, "the prompt leaves nothing to sample"
    arms: list[tuple[Any, float]] = [(None, 1.0), (EM, 1.0), (EM, 2.0), (ADAPTIVE, 1.0)]
    rounds, n = (8, 100) if engine.runner == "v1" else (2, 100)
    shared = {"prompt": UNSURE, "max_tokens": 1, "n": n}
    bodies = [
        shared | {"temperature": t, "seed": 1000 * r + 100_000 * a} | ({"em_inf": em} if em else {})
        for r in range(rounds)
        for a, (em, t) in enumerate(arms)
    ]
    answers = complete(engine, *bodies)
    for a, (em, t) in enumerate(arms):
        drawn = [tokens(answer, choice)[0] for answer in answers[a :: len(arms)] for choice in range(n)]
        counts = np.bincount(drawn, minlength=len(logprobs))
        assert counts.sum() == rounds * n
        wanted = reference.softmax(expected_row(logprobs, em) / t)
        assert fit(counts, wanted) > 1e-4, (em, t)
        others = [reference.softmax(expected_row(logprobs, e) / u) for e, u in arms if (e, u) != (em, t)]
        assert max(fit(counts, other) for other in others) < 1e-4, "the test could not tell the arms apart"


def full_row(answer: dict[str, Any]) -> reference.Row:
    """The first token's log-probabilities [vocab], by token id."""
    by_name = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return np.array([by_name[f"token_id:{token}"] for token in range(len(by_name))])


def expected_row(logprobs: reference.Row, em: Any) -> reference.Row:
    params = parse_params(em)
    if params is None:
        return logprobs
    if params.method == "em_inf":
        return reference.em_inf(logprobs, params)[0]
    return logprobs / reference.temperature(logprobs, params)


def fit(counts: np.ndarray[Any, Any], p: reference.Row) -> float:
    """Chi-square p-value; cells expected fewer than five times are pooled."""
    rare = p * counts.sum() < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(p[~rare], p[rare].sum()) * counts.sum()
    if expected[-1] < 1e-9:
        observed, expected = observed[:-1], expected[:-1]
        if observed.sum() != counts.sum():
            return 0.0
    return float(stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


def test_requests_in_a_mixed_batch_draw_what_they_draw_alone(engine: Server) -> None:
    arms: list[Any] = [EM, None, ADAPTIVE, EM | {"optimizer": "sgd", "learning_rate": 2.0}, None]
    for round_ in range(3 if engine.runner == "v1" else 1):
        bodies = [
            {"prompt": PROMPTS[i % 4], "seed": 10 * round_ + i, "temperature": 1.5, "max_tokens": 5 + 3 * i}
            | {"ignore_eos": True}
            | ({"em_inf": em} if em else {})
            for i, em in enumerate(arms)
        ]
        alone = complete(engine, *bodies, one_by_one=True)
        together = complete(engine, *bodies)
        assert [tokens(a) for a in together] == [tokens(a) for a in alone]


def test_methods_reach_the_rows_of_their_requests_under_pressure(engine: Server) -> None:
    """Two methods that leave nothing but the top token are greedy at any temperature; plain requests among them are
    not. Requests enter and leave, long prompts are prefilled in chunks, and the cache is too small for all."""
    arms: list[Any] = [STRONG, None, COLD, False]
    # Many prompts a request, so that they wait inside the engine: however fast it is, the cache runs out.
    prompts = ["Q" * (70 * (i % 3)) + UNSURE for i in range(12 if engine.runner == "v1" else 3)]
    bodies = [
        {"prompt": prompts, "max_tokens": 16 + 11 * i, "ignore_eos": True} | ({} if arm is None else {"em_inf": arm})
        for i, arm in enumerate(arms)
    ]
    greedy = complete(engine, *[body | {"temperature": 0} for body in bodies])
    preempted = engine.metric("vllm:num_preemptions_total")
    answers = complete(engine, *[body | {"temperature": 2.0} for body in bodies])
    assert engine.metric("vllm:num_preemptions_total") > preempted, "the cache was large enough for all"
    for arm, answer, wanted in zip(arms, answers, greedy, strict=True):
        kept = [tokens(answer, i) == tokens(wanted, i) for i in range(len(prompts))]
        assert kept == [arm in (STRONG, COLD)] * len(prompts)


def test_greedy_requests_keep_their_tokens(engine: Server) -> None:
    shared = {"prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0.0}
    plain, *minimised = complete(engine, shared, shared | {"em_inf": STRONG}, shared | {"em_inf": ADAPTIVE})
    assert [tokens(a) for a in minimised] == [tokens(plain)] * 2


def test_n_samples_share_the_method_and_differ(engine: Server) -> None:
    shared = {"prompt": UNSURE, "max_tokens": 8, "n": 4, "seed": 1, "ignore_eos": True, "temperature": 1.5}
    strong, mild = complete(engine, shared | {"em_inf": STRONG}, shared | {"em_inf": {"steps": 1}})
    assert len({tuple(tokens(strong, i)) for i in range(4)}) == 1
    assert len({tuple(tokens(mild, i)) for i in range(4)}) > 1


def test_forbidden_tokens_stay_forbidden(engine: Server) -> None:
    """A grammar's mask reaches the sampler as -inf; the logit bias has been added by then."""
    answers = complete(
        engine,
        {"prompt": UNSURE, "max_tokens": 12, "em_inf": STRONG, "structured_outputs": {"regex": "[xyz]{6}"}},
        {"prompt": UNSURE, "max_tokens": 3, "em_inf": STRONG, "logit_bias": {"50": 100}},
    )
    assert len(answers[0]["choices"][0]["text"]) == 6
    assert set(answers[0]["choices"][0]["text"]) <= set("xyz")
    assert tokens(answers[1]) == [50] * 3


def test_a_recycled_place_in_the_batch_forgets_its_last_request(engine: Server) -> None:
    shared = {"prompt": PROMPTS[1], "max_tokens": 8, "ignore_eos": True, "temperature": 2.0, "seed": 11}
    before = tokens(complete(engine, shared)[0])
    for _ in range(3):  # more requests than there are slots
        complete(engine, *[shared | {"em_inf": STRONG, "max_tokens": 1}] * 8)
    assert tokens(complete(engine, shared)[0]) == before


def test_reported_logprobs_are_the_models(engine: Server) -> None:
    """vLLM's default reports raw log-probabilities; EM-INF does not move them."""
    plain, minimised = complete(engine, FULL_ROW, FULL_ROW | {"em_inf": STRONG}, one_by_one=True)
    assert np.allclose(full_row(plain), full_row(minimised), atol=1e-5)
