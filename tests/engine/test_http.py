"""The HTTP interface through the official OpenAI client: every form of `em_inf`, and every error of a request."""

import json
from typing import Any

import openai
import pytest

from tests.engine.launch import Server
from tests.engine.support import CHAT, STRONG

pytestmark = [pytest.mark.engine, pytest.mark.essential]


@pytest.fixture
def client(v1: Server) -> openai.OpenAI:
    return v1.client


def chat(client: openai.OpenAI, em_inf: Any = None, **options: Any) -> Any:
    body = {} if em_inf is None else {"em_inf": em_inf}
    settings = {"temperature": 2.0, "seed": 3, "max_tokens": 24} | options
    extra = body | settings.pop("extra_body", {})
    return client.chat.completions.create(model="demo", messages=CHAT, extra_body=extra, **settings)


def text(completion: Any) -> str:
    content: str = completion.choices[0].message.content
    return content


@pytest.fixture
def greedy(client: openai.OpenAI) -> str:
    return text(chat(client, temperature=0))


def test_chat(client: openai.OpenAI, greedy: str) -> None:
    assert text(chat(client, STRONG)) == greedy
    assert text(chat(client)) != greedy
    assert text(chat(client, False)) == text(chat(client))
    assert text(chat(client, True)) == text(chat(client, {}))


def test_the_flat_form_means_the_same(client: openai.OpenAI, greedy: str) -> None:
    flat = {f"em_inf_{name}": value for name, value in STRONG.items()}
    assert text(chat(client, extra_body={"vllm_xargs": flat})) == greedy
    mild: list[dict[str, Any]] = [
        {"method": "adaptive_temperature", "ratio": 0.6},
        {"method": "p_less", "normalized": True},
        {"method": "top_h", "alpha": 0.7},
    ]
    for settings in mild:
        flat_mild = {f"em_inf_{name}": value for name, value in settings.items()}
        assert text(chat(client, extra_body={"vllm_xargs": flat_mild})) == text(chat(client, settings))
    always_greedy = {"em_inf_method": "greedy_below", "em_inf_p_max": 1}
    assert text(chat(client, temperature=2, extra_body={"vllm_xargs": always_greedy})) == greedy
    assert text(chat(client, extra_body={"vllm_xargs": {"em_inf": True}})) == text(chat(client, True))


def test_chat_stream(client: openai.OpenAI, greedy: str) -> None:
    chunks = list(chat(client, STRONG, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == greedy
    assert chunks[-1].usage.completion_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_completions(client: openai.OpenAI, stream: bool) -> None:
    def run(**options: Any) -> list[str]:
        prompts = ["Q", "zq"]  # not in the training data: plain sampling is not greedy
        response: Any = client.completions.create(model="demo", prompt=prompts, max_tokens=12, seed=5, **options)
        if not options.get("stream"):
            return [choice.text for choice in response.choices]
        texts = ["", ""]
        for chunk in response:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        return texts

    greedy = run(temperature=0)
    assert run(temperature=2.0, extra_body={"em_inf": STRONG}, stream=stream) == greedy
    assert run(temperature=2.0, stream=stream) != greedy


@pytest.mark.parametrize("stream", [False, True])
def test_responses(client: openai.OpenAI, stream: bool) -> None:
    def run(**options: Any) -> str:
        response: Any = client.responses.create(model="demo", input="58+17*3-29", max_output_tokens=24, **options)
        if not options.get("stream"):
            output: str = response.output_text
            return output
        return "".join(event.delta for event in response if event.type == "response.output_text.delta")

    greedy = run(temperature=0)
    assert run(temperature=2.0, extra_body={"em_inf": STRONG}, stream=stream) == greedy
    assert run(temperature=2.0, extra_body={"seed": 3}, stream=stream) != greedy


def test_logprobs_with_em_inf(client: openai.OpenAI, greedy: str) -> None:
    response = chat(client, STRONG, logprobs=True, top_logprobs=3)
    assert text(response) == greedy
    tops = response.choices[0].logprobs.content
    assert len(tops) == response.usage.completion_tokens
    for token in tops:  # the top token was sampled each time, and keeps the model's own probability
        assert token.logprob == max(t.logprob for t in token.top_logprobs)
    assert min(token.logprob for token in tops) < -0.01


def test_json_schema_with_em_inf(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}, "colour": {"enum": ["red", "green"]}},
        "required": ["sure", "colour"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}
    for seed in range(3):
        content = json.loads(text(chat(client, True, response_format=form, seed=seed, max_tokens=100, temperature=1)))
        assert set(content) == {"sure", "colour"}
        assert content["colour"] in ("red", "green")


def test_n_choices(client: openai.OpenAI) -> None:
    first, second = (chat(client, {"steps": 2}, n=4, logprobs=True) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in second.choices]


def nested(depth: int) -> Any:
    """Return an object with lists and objects nested to twice this depth."""
    value: Any = 1
    for _ in range(depth):
        value = {"threshold": [value]}
    return value


# em_inf, the field that the error names, and a part of its message.
BAD: dict[str, tuple[Any, str, str]] = {
    "above the range": ({"threshold": 21}, "body.em_inf.threshold", "from 0 up to 20"),
    "below the range": ({"steps": -1}, "body.em_inf.steps", "from 0 up to 64"),
    "open bound": ({"learning_rate": 0}, "body.em_inf.learning_rate", "above 0, up to 10"),
    "nan": ({"threshold": float("nan")}, "body.em_inf.threshold", "got NaN"),
    "infinity": ({"kl_weight": float("inf")}, "body.em_inf.kl_weight", "inf"),
    "huge integer": ({"threshold": 10**300}, "body.em_inf.threshold", "a huge integer"),
    "string": ({"threshold": "0.3"}, "body.em_inf.threshold", 'got "0.3"'),
    "boolean": ({"steps": True}, "body.em_inf.steps", "got true"),
    "unknown key": ({"treshold": 0.3}, "body.em_inf.treshold", "unknown field"),
    "unknown method": ({"method": "magic"}, "body.em_inf.method", "adaptive_temperature"),
    "a string": ("on", "body.em_inf", "true or false"),
    "a number": (1, "body.em_inf", "true or false"),
    "a list": ([{"threshold": 0.3}], "body.em_inf", "true or false"),
    "nested junk": (nested(40), "body.em_inf.threshold", "a list of 1 items"),
    "10 MB of text": ({"threshold": "x" * 10**7}, "body.em_inf.threshold", "xxx..."),
    "3 MB of keys": ({f"k{i}": i for i in range(190_000)}, "body.em_inf.k0", "unknown field"),
    "10 MB of keys": ({f"k{i}": i for i in range(700_000)}, "body", "too many values"),
}


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize(("value", "param", "message"), BAD.values(), ids=BAD.keys())
def test_bad_values(v1: Server, greedy: str, route: str, value: Any, param: str, message: str) -> None:
    content: dict[str, Any] = {
        "/v1/chat/completions": {"messages": CHAT},
        "/v1/completions": {"prompt": "7"},
        "/v1/responses": {"input": "7"},
    }[route]
    body = json.dumps({"model": "demo", **content, "em_inf": value})
    response = v1.http.post(route, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text[:500]
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert len(error["message"]) < 400
    assert (error["code"], type(error["type"])) == (400, str)
    assert text(chat(v1.client, STRONG)) == greedy


MALFORMED = {
    "not JSON": b'{"em_inf": {',
    "deep brackets": b'{"model": "demo", "em_inf": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "not an object": b"[1, 2, 3]",
    "10 MB prompt": json.dumps({"model": "demo", "messages": [{"role": "user", "content": "7" * 10**7}]}).encode(),
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_bodies(v1: Server, greedy: str, body: bytes) -> None:
    response = v1.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert len(response.json()["error"]["message"]) < 2000
    assert text(chat(v1.client, STRONG)) == greedy


@pytest.mark.parametrize(
    ("xargs", "param"),
    [
        ({"em_inf_threshold": 99}, "body.vllm_xargs.em_inf_threshold"),
        ({"em_inf_optimizer": "lion"}, "body.vllm_xargs.em_inf_optimizer"),
        ({"em_inf_unknown": 1}, "body.vllm_xargs.em_inf_unknown"),
        ({"em_inf_method": "top_h", "em_inf_alpha": 0}, "body.vllm_xargs.em_inf_alpha"),
        ({"em_inf_method": "p_less", "em_inf_normalized": 2}, "body.vllm_xargs.em_inf_normalized"),
    ],
)
def test_bad_flat_values(client: openai.OpenAI, xargs: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, extra_body={"vllm_xargs": xargs})
    assert caught.value.param == param


def test_both_forms_at_once_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not both"):
        chat(client, {"steps": 3}, extra_body={"vllm_xargs": {"em_inf_steps": 3}})


@pytest.mark.parametrize("em_inf", [True, {}, {"steps": 3}])
def test_beam_search_is_refused(client: openai.OpenAI, em_inf: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="beam search does not sample") as caught:
        chat(client, em_inf, n=2, temperature=0, extra_body={"use_beam_search": True})
    assert caught.value.param == "body.em_inf"
    response = chat(client, False, n=2, temperature=0, extra_body={"use_beam_search": True})
    assert len(response.choices) == 2


def test_routes_that_do_not_sample_refuse_em_inf(v1: Server) -> None:
    response = v1.http.post("/tokenize", json={"model": "demo", "prompt": "7", "em_inf": {}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "body.em_inf"
    assert "/v1/chat/completions" in response.json()["error"]["message"]
    assert v1.http.post("/tokenize", json={"model": "demo", "prompt": "7"}).json()["count"] == 1


def test_clients_can_ask_what_the_server_supports(v1: Server) -> None:
    supported = v1.http.get("/v1/em_inf").json()
    assert supported["available"] is True
    assert supported["default"] is None
    assert supported["methods"]["em_inf"]["threshold"]["maximum"] == 20
    assert supported["methods"]["em_inf"]["steps"]["default"] == 5
    assert supported["methods"]["adaptive_temperature"]["ratio"]["default"] == 0.5
    assert set(supported["methods"]["none"]) == {"method", "stats", "top"}
    assert (supported["methods"]["top_h"]["alpha"]["maximum"], supported["methods"]["top_n_sigma"]["n"]["default"]) == (
        1,
        1,
    )
    assert supported["methods"]["p_less"]["normalized"]["type"] == "boolean"
    assert set(supported["versions"]) == {"em-inf-server", "vllm"}
    assert v1.http.get("/v1/em_inf", headers={"Authorization": "Bearer wrong"}).status_code == 401


def test_clients_can_ask_which_transform_the_workers_use(engine: Server) -> None:
    transforms = engine.http.get("/v1/em_inf").json()["transforms"]
    assert transforms == [{"transform": "numba_cpu", "device": "cpu"}]


def test_openapi_shows_the_fields(v1: Server) -> None:
    schema = v1.http.get("/openapi.json").json()
    for route in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        reference = schema["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        model = schema["components"]["schemas"][reference.rsplit("/", 1)[1]]
        choices = model["properties"]["em_inf"]["anyOf"]
        named = [choice["$ref"].rsplit("/", 1)[1] for choice in choices if "$ref" in choice]
        removing = ["PLessParams", "TopHParams", "TopNSigmaParams", "GreedyBelowParams"]
        assert named == ["EMInfParams", "AdaptiveTemperatureParams", "MeasureParams", *removing]
    assert schema["components"]["schemas"]["EMInfParams"]["properties"]["threshold"]["maximum"] == 20
    assert "get" in schema["paths"]["/v1/em_inf"]
