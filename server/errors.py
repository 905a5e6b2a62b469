"""Errors that this server answers itself, in OpenAI's shape."""

from collections.abc import Mapping
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import JSONResponse
from vllm.exceptions import VLLMValidationError

from em_sampler.validation import ParamsError


def error_response(status: HTTPStatus, message: str, param: str | None, headers: Mapping[str, str]) -> JSONResponse:
    """Make the response for an error that vLLM has no handler for."""
    content = {"message": message, "type": status.phrase, "param": param, "code": status.value}
    return JSONResponse({"error": content}, status.value, headers=headers)


def bad_request(error: ParamsError) -> VLLMValidationError:
    """Make the exception that vLLM answers with 400, naming the field."""
    return VLLMValidationError(str(error), parameter=error.field)


def unsupported_field(raw_request: Request, field: str, reason: str) -> VLLMValidationError:
    """Make the exception (400) for a field that the request's route would ignore."""
    message = f"{field} is not supported on {raw_request.url.path}: {reason}"
    return VLLMValidationError(message, parameter=f"body.{field}")
