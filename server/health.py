"""Probes without a key for Kubernetes and load balancers: `GET /health/live` and `GET /health/ready`."""

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response


async def live() -> Response:
    """Return 200 as long as the process answers: a busy or draining server must not be restarted."""
    return Response()


async def ready(raw_request: Request) -> Response:
    """Return 200 if requests may be sent here, 503 if the server is draining or its engine is dead."""
    state = raw_request.app.state
    if state.drain.draining:
        return Response("draining", HTTPStatus.SERVICE_UNAVAILABLE)
    try:
        if state.engine_client is not None:
            await state.engine_client.check_health()
    except Exception as error:  # vLLM reports a dead engine by raising
        return Response(f"{type(error).__name__}: {error}", HTTPStatus.SERVICE_UNAVAILABLE)
    return Response()
