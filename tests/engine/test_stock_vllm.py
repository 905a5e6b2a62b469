"""vLLM's own server with the plugin and without em-serve: every method by `vllm_xargs`, and what becomes of mistakes.

The front-end in Rust is not in vLLM's CPU build: its tests run if VLLM_RUST_FRONTEND_PATH is that of a `vllm-rs`, which
vLLM's wheel for CUDA has.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from em_sampler.params import METHODS
from em_sampler.transforms import reference
from harness.launch import together
from tests.engine.launch import Server, serve_stock
from tests.engine.support import ALL_LOGPROBS, CHAT, UNSURE, complete, logprob_rows, tokens, transformed_row

pytestmark = pytest.mark.engine

RUST = os.environ.get("VLLM_RUST_FRONTEND_PATH")
needs_rust = pytest.mark.skipif(not RUST, reason="VLLM_RUST_FRONTEND_PATH names no vllm-rs")
FLAGS = ("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1")
REMOVED = -9000  # vLLM writes -9999 for -inf

# Settings without the prefix, and the request's temperature.
CASES: list[tuple[dict[str, Any], float]] = [
    ({"threshold": 0.0}, 1.0),
    ({"method": "em_inf", "threshold": 0.2, "steps": 12, "optimizer": "sgd", "learning_rate": 0.5}, 0.7),
    ({"method": "adaptive_temperature", "ratio": 0.4}, 1.5),
    ({"method": "none"}, 1.5),
    ({"method": "p_less"}, 1.0),
    ({"method": "p_less", "normalized": True}, 2.0),
    ({"method": "top_h", "alpha": 0.4}, 1.0),
    ({"method": "top_n_sigma", "n": 1.5}, 2.0),
    ({"method": "greedy_below", "p_max": 0.9}, 1.0),
]
LEFT_ALONE = {"method": "none"}
# Each leaves only the likeliest token of a position at which two are not equal.
GREEDY: list[dict[str, Any]] = [
    {"threshold": 0.0, "steps": 64, "learning_rate": 10.0},
    {"method": "adaptive_temperature", "ratio": 0.0, "threshold": 0.0, "min_temperature": 0.001},
    {"method": "top_h", "alpha": 0.001},
    {"method": "top_n_sigma", "n": 0.001},
    {"method": "greedy_below", "p_max": 1},
]


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a request that ask for `settings` in the flat form."""
    return {"vllm_xargs": {f"em_inf_{name}": value for name, value in settings.items()}}


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Server]]:
    """Start a server for each of vLLM's front-ends that is here, together."""
    rust = {"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": str(RUST)}
    starts = {"python": serve_stock(*FLAGS), "rust": serve_stock(*FLAGS, executor="mp", **rust)}
    names = ["python", "rust"] if RUST else ["python"]
    with together(*(starts[name] for name in names)) as running:
        yield dict(zip(names, running, strict=True))


@pytest.fixture(params=["python", pytest.param("rust", marks=needs_rust)])
def server(request: pytest.FixtureRequest, servers: dict[str, Server]) -> Server:
    """Run the test twice: on vLLM's front-end in Python and on the one in Rust."""
    return servers[request.param]


@pytest.fixture
def python(servers: dict[str, Server]) -> Server:
    return servers["python"]


@pytest.fixture
def rust(servers: dict[str, Server]) -> Server:
    return servers["rust"]


def rows_of(server: Server, *bodies: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """Return the log-probabilities that each request's tokens were sampled from, [tokens, vocab]; removed: -inf."""
    responses = complete(server, *({"prompt": UNSURE, "max_tokens": 1} | ALL_LOGPROBS | body for body in bodies))
    rows = [logprob_rows(response["choices"][0]) for response in responses]
    return [np.where(row < REMOVED, -np.inf, row) for row in rows]


def check_row(sampled_from: reference.Row, raw: reference.Row, settings: dict[str, Any], temperature: float) -> None:
    """Check the row that a token was sampled from against the reference, applied to the model's own row."""
    expected = transformed_row(raw, settings, temperature) / temperature
    assert np.array_equal(np.isfinite(sampled_from), np.isfinite(expected)), settings
    difference = np.exp(sampled_from) - reference.softmax(expected)
    assert np.abs(difference).sum() / 2 < 1e-4, settings


def test_every_method_acts(server: Server) -> None:
    assert {settings.get("method", "em_inf") for settings, _ in CASES} == set(METHODS)
    [raw], *rows = rows_of(server, {}, *(flat(settings) | {"temperature": t} for settings, t in CASES))
    for [row], (settings, temperature) in zip(rows, CASES, strict=True):
        check_row(row, raw, settings, temperature)
        changed = np.abs(np.exp(row) - reference.softmax(raw / temperature)).sum() / 2
        assert changed < 1e-5 if settings == LEFT_ALONE else changed > 0.05


def test_every_method_acts_on_its_own_request_in_a_mixed_batch(server: Server) -> None:
    """Every token of every request, greedy ones and those without a method among them."""
    common = {"prompt": UNSURE, "max_tokens": 12, "ignore_eos": True} | ALL_LOGPROBS
    bodies = [flat(settings) | {"temperature": t, "seed": i} for i, (settings, t) in enumerate(CASES)]
    bodies += [{"temperature": 1.3, "seed": 1}, {"temperature": 0}, flat({"method": "top_h"}) | {"temperature": 0}]
    cases = [*CASES, (LEFT_ALONE, 1.3), (LEFT_ALONE, 1.0), (LEFT_ALONE, 1.0)]  # a greedy row is reported at 1
    responses = complete(server, *(common | body for body in bodies))
    assert tokens(responses[-1]) == tokens(responses[-2])

    [prompt] = server.http.post("/tokenize", json={"model": "demo", "prompt": UNSURE}).json()["tokens"]
    for response, (settings, temperature) in zip(responses, cases, strict=True):
        sampled_from = logprob_rows(response["choices"][0])
        so_far = [[prompt, *tokens(response)[:i]] for i in range(12)]
        raw = rows_of(server, *({"prompt": ids} for ids in so_far))
        for row, [raw_row] in zip(np.where(sampled_from < REMOVED, -np.inf, sampled_from), raw, strict=True):
            check_row(row, raw_row, settings, temperature)


@pytest.mark.parametrize("settings", GREEDY, ids=lambda settings: settings.get("method", "em_inf"))
def test_the_openai_client_sends_it_as_extra_body(server: Server, settings: dict[str, Any]) -> None:
    def ask(client: openai.OpenAI, **options: Any) -> tuple[str | None, str]:
        common: dict[str, Any] = {"model": "demo", "max_tokens": 12, "temperature": 2.0, "seed": 3} | options
        chat = client.chat.completions.create(messages=CHAT, **common)
        return chat.choices[0].message.content, client.completions.create(prompt=UNSURE, **common).choices[0].text

    greedy, sampled = ask(server.client, temperature=0), ask(server.client)
    assert ask(server.client, extra_body=flat(settings)) == greedy
    assert sampled[0] != greedy[0]
    assert sampled[1] != greedy[1]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/responses", {"input": CHAT[0]["content"], "max_output_tokens": 12}),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 12}),
    ],
)
def test_other_routes_take_it_too(python: Server, route: str, body: dict[str, Any]) -> None:
    def ask(**options: Any) -> dict[str, Any]:
        reply: dict[str, Any] = python.http.post(
            route, json={"model": "demo", "temperature": 2.0} | body | options
        ).json()
        return reply

    def text(reply: dict[str, Any]) -> str:
        content: str = (reply.get("output") or [reply])[0]["content"][0]["text"]
        return content

    assert text(ask(**flat(GREEDY[-1]))) == text(ask(temperature=0))
    error = ask(**flat({"method": "top_h", "alpha": 2}))["error"]
    assert "em_inf_alpha: got 2; must be a number above 0, up to 1" in error["message"]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"em_inf_method": "top_h", "em_inf_alpha": 2}, "em_inf_alpha", "got 2; must be a number above 0, up to 1"),
    ({"em_inf_method": "top_n_sigma", "em_inf_n": 0}, "em_inf_n", "got 0; must be a number above 0, up to 20"),
    ({"em_inf_method": "top_p"}, "em_inf_method", 'got "top_p"; must be one of em_inf, adaptive_temperature, none, '),
    (
        {"em_inf_method": "top_h", "em_inf_alhpa": 0.4},
        "em_inf_alhpa",
        "unknown field; known fields are stats, top, method,",
    ),
    ({"em_inf_stats": "summary"}, "em_inf_stats", 'got "summary"; statistics come with em-serve\'s completions, chat'),
]


@pytest.mark.parametrize(("xargs", "field", "problem"), WRONG)
def test_a_mistake_is_refused_by_name(python: Server, xargs: dict[str, Any], field: str, problem: str) -> None:
    for route, content in {"chat/completions": {"messages": CHAT}, "completions": {"prompt": UNSURE}}.items():
        response = python.http.post(f"/v1/{route}", json={"model": "demo", "vllm_xargs": xargs} | content)
        assert response.status_code == 400
        error = response.json()["error"]
        assert f"{field}: {problem}" in error["message"]
        assert error["param"] == f"body.vllm_xargs.{field}"


def test_the_object_form_is_refused_in_vllm_xargs(python: Server) -> None:
    with pytest.raises(openai.BadRequestError, match=r"body\.vllm_xargs\.em_inf"):
        python.client.completions.create(model="demo", prompt="7", extra_body={"vllm_xargs": {"em_inf": {"steps": 3}}})


@pytest.mark.parametrize("body", [{"em_inf": GREEDY[-1]}, {"vllm_xargs": {"eminf_method": "p_less"}}])
def test_what_vllm_does_not_know_is_ignored_in_silence(server: Server, body: dict[str, Any]) -> None:
    """As the documentation says: neither the object form nor a misspelt prefix reaches the plugin."""
    [plain], [same] = rows_of(server, {}, body)
    assert np.allclose(plain, same, atol=1e-5)


@needs_rust
def test_the_front_end_in_rust_takes_the_object_form(rust: Server) -> None:
    settings, temperature = CASES[-1]
    [raw], [row] = rows_of(rust, {}, {"vllm_xargs": {"em_inf": settings}, "temperature": temperature})
    check_row(row, raw, settings, temperature)


@needs_rust
@pytest.mark.parametrize(("xargs", "field", "problem"), WRONG)
def test_a_mistake_that_rust_does_not_see_ends_no_engine(
    rust: Server, xargs: dict[str, Any], field: str, problem: str
) -> None:
    [plain], [same] = rows_of(rust, {}, {"vllm_xargs": xargs})
    if field != "em_inf_stats":  # this one has a method, and its stats go nowhere
        assert np.allclose(plain, same, atol=1e-5)
        assert f"sampled without a method: {field}: {problem}" in rust.log.read_text()
