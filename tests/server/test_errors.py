"""Errors that this server answers itself have OpenAI's shape, and name the field."""

import json

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from em_sampler.validation import ParamsError
from server import errors


def body(response: JSONResponse) -> dict[str, object]:
    parsed: dict[str, object] = json.loads(bytes(response.body))
    return parsed


def test_too_many_branches_is_429_and_says_when_to_retry() -> None:
    response = errors.too_many_branches("8 places asked for, 3 of 5 are free")
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert "connection" not in response.headers
    message = "8 places asked for, 3 of 5 are free"
    error = {"message": message, "type": "Too Many Requests", "param": "body.strategy", "code": 429}
    assert body(response) == {"error": error}


def test_shutting_down_is_503_and_closes_the_connection() -> None:
    response = errors.shutting_down()
    assert response.status_code == 503
    assert (response.headers["retry-after"], response.headers["connection"]) == ("1", "close")
    message = "this server is shutting down: send the request again"
    assert body(response) == {"error": {"message": message, "type": "Service Unavailable", "param": None, "code": 503}}


def test_exceptions_for_vllm_name_the_field() -> None:
    error = errors.bad_request(ParamsError("body.em_inf.steps", "got 99; must be below"))
    assert (error.parameter, "body.em_inf.steps: got 99; must be below" in str(error)) == ("body.em_inf.steps", True)
    error = errors.unsupported_field("/v1/embeddings", "em_inf", "a pooling model samples no tokens")
    assert error.parameter == "body.em_inf"
    assert "em_inf is not supported on /v1/embeddings: a pooling model samples no tokens" in str(error)
    error = errors.unreadable_body(HTTPException(400, "There was an error parsing the body"))
    assert error.parameter == "body"
    assert "There was an error parsing the body" in str(error)
