"""Probes: `GET /health/live` and `GET /health/ready`, for Kubernetes and load balancers."""

from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import Response


async def live() -> Response:
    """Whether the process answers, whatever its engine does: a busy or draining server is not to be restarted."""
    return Response()


async def ready(raw_request: Request) -> Response:
    """Whether to send requests here: not to a server that drains, or whose engine is dead."""
    state: Any = raw_request.app.state
    if state.drain.draining:
        return Response("draining", HTTPStatus.SERVICE_UNAVAILABLE)
    try:
        if state.engine_client is not None:
            await state.engine_client.check_health()
    except Exception as error:  # of vLLM's: its way to say so
        return Response(f"{type(error).__name__}: {error}", HTTPStatus.SERVICE_UNAVAILABLE)
    return Response()
