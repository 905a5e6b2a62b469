"""vLLM's offline `LLM`, without a server, finds the plugin by its entry point: an example's `LLM`."""

import ast
from typing import Any

import pytest

from tests.engine.launch import offline
from tests.engine.support import EXAMPLES, STRONG, UNSURE

pytestmark = pytest.mark.engine

HOT: dict[str, Any] = {"temperature": 2.0, "seed": 1, "max_tokens": 20}
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "max_tokens": 20},
    "nested": HOT | {"extra_args": {"em_inf": STRONG}},
    "flat": HOT | {"extra_args": {f"em_inf_{name}": value for name, value in STRONG.items()}},
    "plain": HOT,
    "refused": HOT | {"extra_args": {"em_inf": {"threshold": 25}}},
    "again": HOT | {"extra_args": {"em_inf": STRONG}},
    "greedy_below": HOT | {"extra_args": {"em_inf": {"method": "greedy_below", "p_max": 1}}},
    "top_h": HOT | {"extra_args": {"em_inf_method": "top_h", "em_inf_alpha": 1e-6}},
    "top_n_sigma": HOT | {"extra_args": {"em_inf_method": "top_n_sigma", "em_inf_n": 1e-4}},
    "p_less": HOT | {"extra_args": {"em_inf": {"method": "p_less"}}},
}


@pytest.fixture(scope="module")
def run() -> tuple[dict[str, Any], str]:
    """Return the answers to PARAMS by their names, and what the example printed."""
    requests = [{"prompt": UNSURE, "params": params} for params in PARAMS.values()]
    answers, printed = offline(requests, "v1", script=EXAMPLES / "offline_vllm.py")
    return dict(zip(PARAMS, answers, strict=True)), printed


def test_llm_honours_extra_args(run: tuple[dict[str, Any], str]) -> None:
    answers, _ = run
    assert answers["nested"] == answers["flat"] == answers["again"] == answers["greedy"]
    assert answers["greedy_below"] == answers["top_h"] == answers["top_n_sigma"] == answers["greedy"]  # one token stays
    assert answers["plain"] != answers["greedy"] and answers["p_less"] != answers["plain"]
    assert answers["refused"].startswith("em_inf.threshold: got 25; must be a number from 0 up to 20 (parameter=")


def test_the_example_samples_other_replies_with_em_inf(run: tuple[dict[str, Any], str]) -> None:
    """The seeds are the same: without the plugin the two lines were the same."""
    _, printed = run
    plain, minimised = (line for line in printed.splitlines() if line.startswith("em_inf="))  # vLLM's log is there too
    assert plain.startswith("em_inf=False: [('")
    assert minimised.startswith("em_inf={'threshold': 0.3}: [('")
    assert ast.literal_eval(minimised.split(": ", 2)[2]) != ast.literal_eval(plain.split(": ", 1)[1])
