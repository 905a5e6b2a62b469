"""The routes in a small app: which are rebuilt, what the others reject, and what is answered while draining."""

import asyncio
from argparse import Namespace
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI, Form, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse
from vllm.exceptions import VLLMValidationError

from em_sampler.params import MAX_STEPS, EMInfParams
from em_sampler.vllm_plugin.processor import EMInfLogitsProcessor
from server.endpoints import EMInfEndpoints

ARGS = Namespace(model="m", served_model_name=None, strategy_max_branches=6)


class CompletionRequest(BaseModel, extra="allow"):
    prompt: str = ""
    vllm_xargs: dict[str, Any] | None = None


async def create_completion(request: CompletionRequest, raw_request: Request) -> Any:
    return JSONResponse({"prompt": request.prompt})


async def tokenize(request: CompletionRequest, raw_request: Request) -> Any:
    return JSONResponse({"count": len(request.prompt)})


async def transcribe(prompt: Annotated[str, Form()]) -> Any:
    return JSONResponse({"text": prompt})


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    """A server without an engine. Its metrics are those of the process, so there is one."""
    app = FastAPI()
    app.post("/v1/completions")(create_completion)
    app.post("/tokenize")(tokenize)
    app.post("/v1/audio/transcriptions")(transcribe)
    app.get("/ping")(lambda: "pong")
    app.add_exception_handler(VLLMValidationError, _as_vllm)
    plugin = EMInfEndpoints()
    plugin.attach_router(app)
    assert plugin.rebuilt == ["/v1/completions"]
    asyncio.run(plugin.init_state(None, app.state, ARGS))
    app.state.engine_client = None
    yield app
    EMInfLogitsProcessor.max_steps = MAX_STEPS


async def _as_vllm(request: Request, error: Any) -> JSONResponse:
    return JSONResponse({"error": {"message": str(error), "param": error.parameter}}, 400)


def send(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def test_routes_answer_as_before(app: FastAPI) -> None:
    assert send(app, "POST", "/v1/completions", json={"prompt": "7"}).json() == {"prompt": "7"}
    assert send(app, "POST", "/tokenize", json={"prompt": "7", "em_inf": False}).json() == {"count": 1}
    assert send(app, "GET", "/ping").json() == "pong"


def test_the_server_describes_itself(app: FastAPI) -> None:
    described = send(app, "GET", "/v1/em_inf").json()
    assert (described["available"], described["unavailable_because"]) == (False, "this server has no engine")
    assert described["strategies"]["deepconf"]["properties"]["n"]["maximum"] == 6


@pytest.mark.parametrize(
    ("path", "field", "says"),
    [
        ("/tokenize", "em_inf", "em_inf is not supported on /tokenize: this server has no engine"),
        ("/tokenize", "strategy", "strategy is not supported on /tokenize: use /v1/chat/completions"),
        ("/v1/completions", "em_inf", "this server has no engine"),
        ("/v1/completions", "strategy", "strategy is not supported on /v1/completions: use /v1/chat/completions"),
    ],
)
def test_fields_that_would_be_ignored_are_rejected(app: FastAPI, path: str, field: str, says: str) -> None:
    response = send(app, "POST", path, json={"prompt": "7", field: {}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == f"body.{field}"
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "APPLICATION/JSON",
        "Application/JSON; charset=utf-8",
        "application/vnd.api+json",
        "application/json;x=1",
        " application/json ",
        "application /json",
        "text/plain",
        "multipart/form-data",
        "json",
        "",
    ],
)
@pytest.mark.parametrize("field", ["em_inf", "strategy"])
def test_a_field_is_rejected_whenever_fastapi_reads_json(app: FastAPI, content_type: str, field: str) -> None:
    headers = {"content-type": content_type}
    read = send(app, "POST", "/tokenize", content=b'{"prompt": "7"}', headers=headers).status_code == 200
    response = send(app, "POST", "/tokenize", content=f'{{"{field}": {{}}}}'.encode(), headers=headers)
    assert response.status_code == (400 if read else 422)
    assert read == ("application/" in content_type.lower())


@pytest.mark.parametrize("options", [{}, {"files": {"file": b"RIFF"}}], ids=["urlencoded", "multipart"])
def test_a_field_of_a_form_is_rejected(app: FastAPI, options: dict[str, Any]) -> None:
    def transcriptions(**fields: str) -> httpx.Response:
        return send(app, "POST", "/v1/audio/transcriptions", data={"prompt": "7", **fields}, **options)

    assert transcriptions().json() == {"text": "7"}
    # OpenAI's clients write {"em_inf": {"steps": 3}} as the second.
    for name, param in {"em_inf": "em_inf", "em_inf[steps]": "em_inf", "strategy[type]": "strategy"}.items():
        response = transcriptions(**{name: "3"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, f"body.{param}"), name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"em_inf_threshold": 0.3}, "body.em_inf_threshold"),
        ({"extra_body": {"em_inf": True}}, "body.extra_body.em_inf"),
        ({"stratgy": {"type": "refinement"}}, "body.stratgy"),
        ({"vllm_xargs": {"em-inf": 1}}, "body.vllm_xargs.em-inf"),
    ],
)
def test_a_misspelt_field_is_refused_on_a_sampling_route(app: FastAPI, fields: dict[str, Any], param: str) -> None:
    response = send(app, "POST", "/v1/completions", json={"prompt": "7", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert "did you mean" in response.json()["error"]["message"]
    assert send(app, "POST", "/v1/completions", json={"prompt": "7", "other": 1}).status_code == 200


def test_a_body_that_cannot_be_parsed_has_openais_error_shape(app: FastAPI) -> None:
    body = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    response = send(app, "POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "body"


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_body_of_too_many_values_is_refused(app: FastAPI, path: str) -> None:
    response = send(app, "POST", path, json={"prompt": "7", "other": [[]] * 200_000})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "body")
    assert "too many values" in response.json()["error"]["message"]


def test_while_draining_post_routes_are_closed_and_others_are_not(app: FastAPI) -> None:
    assert send(app, "GET", "/health/ready").status_code == 200
    app.state.drain.run(timeout_s=0)
    try:
        refused = send(app, "POST", "/v1/completions", json={"prompt": "7"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "Service Unavailable")
        assert send(app, "GET", "/ping").status_code == 200
        assert send(app, "GET", "/health/live").status_code == 200
        assert send(app, "GET", "/health/ready").status_code == 503
    finally:
        app.state.drain.draining = False


def test_a_default_that_cannot_work_stops_the_start() -> None:
    args = Namespace(**vars(ARGS) | {"em_inf_default": EMInfParams()})
    with pytest.raises(RuntimeError, match="--em-inf-default cannot work here: this server has no engine"):
        asyncio.run(EMInfEndpoints().init_state(None, Namespace(), args))
