"""Errors of this server in OpenAI's shape: exceptions that vLLM's handlers answer, and responses for what they cannot.

Contract: docs/http.md, "Errors".
"""

import json
from collections.abc import Mapping
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from vllm.exceptions import VLLMValidationError

from em_sampler.validation import ParamsError
from server.strategies.registry import STRATEGY_KEY

RETRY_AFTER_S = "1"


def bad_request(error: ParamsError) -> VLLMValidationError:
    """Make the exception that vLLM answers with 400; `param` in the body names the field."""
    return VLLMValidationError(str(error), parameter=error.field)


def unsupported_field(path: str, field: str, reason: str) -> VLLMValidationError:
    """Make the exception (400) for a field that the route at `path` would ignore."""
    return VLLMValidationError(f"{field} is not supported on {path}: {reason}", parameter=f"body.{field}")


def unreadable_body(error: HTTPException) -> VLLMValidationError:
    """Make the exception (400) for a body that FastAPI could not parse."""
    return VLLMValidationError(error.detail, parameter="body")


def too_many_branches(message: str) -> JSONResponse:
    """Make the 429 for a request whose strategy needs more branches than are free."""
    headers = {"Retry-After": RETRY_AFTER_S}
    return _error_response(HTTPStatus.TOO_MANY_REQUESTS, message, f"body.{STRATEGY_KEY}", headers)


def too_large_message(limit: int) -> str:
    """Say how many bytes a body may have."""
    return f"the body is too large: this server takes at most {limit} bytes (--max-request-bytes)"


def too_large(limit: int) -> JSONResponse:
    """Make the 413 for a body above `limit` bytes, whose rest is not read."""
    headers = {"Connection": "close"}
    return _error_response(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_large_message(limit), "body", headers)


def shutting_down() -> JSONResponse:
    """Make the 503 for a request after SIGTERM; `Connection: close` makes the client's next one go elsewhere."""
    message = "this server is shutting down: send the request again"
    headers = {"Retry-After": RETRY_AFTER_S, "Connection": "close"}
    return _error_response(HTTPStatus.SERVICE_UNAVAILABLE, message, None, headers)


def cut_off_event() -> bytes:
    """Make the end of a stream that this server's shutdown cuts off: an error, then [DONE]."""
    error = _error(HTTPStatus.SERVICE_UNAVAILABLE, "this server is shutting down: the reply was cut off", None)
    return f"data: {json.dumps(error, allow_nan=False)}\n\ndata: [DONE]\n\n".encode()


def _error_response(status: HTTPStatus, message: str, param: str | None, headers: Mapping[str, str]) -> JSONResponse:
    return JSONResponse(_error(status, message, param), status.value, headers)


def _error(status: HTTPStatus, message: str, param: str | None) -> dict[str, dict[str, str | int | None]]:
    return {"error": {"message": message, "type": status.phrase, "param": param, "code": status.value}}
