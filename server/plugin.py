"""Routes and state: what vLLM's server calls, by the entry point `vllm.endpoint_plugins`, to become ours.

Core routes are rebuilt around vLLM's own handlers, never copied. Contract: vllm/plugins/endpoint_plugins/interface.py.
"""

import functools
import inspect
from argparse import Namespace
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from http import HTTPStatus
from importlib import metadata
from typing import Any, get_type_hints

from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMClientError, VLLMValidationError

from em_sampler.params import EXTRA_ARGS_KEY, MAX_STEPS, ParamsError
from em_sampler.plugin import EMInfLogitsProcessor
from em_sampler.supported import installed_vllm
from server.engine import tallies, watch
from server.metrics import UNKNOWN, Metrics
from server.protocol import Settings, apply_em_inf, with_em_inf
from server.reply import Outcome, ReplyStatistics, with_statistics

SAMPLING_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


class Route(APIRoute):
    """A route whose unreadable bodies are answered in OpenAI's shape, which vLLM gives to all errors but these."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler; what it cannot parse becomes vLLM's 400."""
        handle = super().get_route_handler()

        async def handle_or_refuse(request: Request) -> Response:
            try:
                return await handle(request)
            except HTTPException as error:
                # FastAPI's own subclass, which handlers raise, has a handler in vLLM; Starlette's has none.
                if type(error) is not HTTPException or error.status_code != HTTPStatus.BAD_REQUEST:
                    raise
                raise VLLMValidationError(error.detail, parameter="body") from None

        return handle_or_refuse


class EMInfEndpoints:
    """The endpoint plugin: `em_inf` on the sampling routes, a clear refusal on the others, and `GET /v1/em_inf`."""

    name = "em_inf"
    required_tasks = None  # pooling models too: their requests are told that em_inf cannot work

    def __init__(self) -> None:
        self.rebuilt: list[str] = []  # the sampling routes that were found

    def attach_router(self, app: FastAPI) -> None:
        """Rebuild the POST routes in place (before vLLM 0.32 an appended route would never match)."""
        for position, route in enumerate(app.router.routes):
            if not isinstance(route, APIRoute) or "POST" not in route.methods:
                continue
            if route.path in SAMPLING_ROUTES:
                app.router.routes[position] = _rebuilt(route, endpoint=_accepting_em_inf(route.endpoint))
                self.rebuilt.append(route.path)
            else:
                app.router.routes[position] = _rebuilt(route, dependencies=[Depends(refuse_em_inf)])
        app.get("/v1/em_inf")(describe)

    async def init_state(self, engine_client: EngineClient | None, state: Any, args: Namespace) -> None:
        """Keep the operator's choices where the routes find them.

        Raises:
            RuntimeError: where they, or em_inf as such, cannot work on this engine.
        """
        default, unavailable = getattr(args, "em_inf_default", None), _unavailable(engine_client)
        if not unavailable and not self.rebuilt:
            raise RuntimeError(f"none of {', '.join(SAMPLING_ROUTES)} was found in vLLM's app: em_inf would be ignored")
        if default and unavailable:
            raise RuntimeError(f"--em-inf-default cannot work here: {unavailable}")
        state.em_inf = settings = Settings(
            default=default,
            max_steps=getattr(args, "em_inf_max_steps", MAX_STEPS),
            unavailable=unavailable,
            versions={"em-inf-server": metadata.version("em-inf-server"), "vllm": installed_vllm() or ""},
        )
        EMInfLogitsProcessor.max_steps = settings.max_steps
        state.em_inf_metrics = metrics = Metrics((args.served_model_name or [args.model])[0])
        if engine_client is not None and not unavailable:
            await watch(engine_client, metrics)


async def describe(raw_request: Request) -> dict[str, Any]:
    """What this server supports: methods with their fields, defaults and limits, and versions."""
    settings: Settings = raw_request.app.state.em_inf
    return settings.describe()


async def refuse_em_inf(raw_request: Request) -> None:
    """400 for `em_inf` where it would be ignored in silence.

    Raises:
        VLLMValidationError: where the body has an `em_inf` field.
    """
    if not raw_request.headers.get("content-type", "").startswith("application/json"):
        return
    try:
        body = await raw_request.json()
    except (ValueError, RecursionError):
        return  # the route itself says what is wrong with it
    if isinstance(body, dict) and body.get(EXTRA_ARGS_KEY) not in (None, False):
        settings: Settings = raw_request.app.state.em_inf
        reason = settings.unavailable or f"use one of {', '.join(SAMPLING_ROUTES)}"
        message = f"em_inf is not supported on {raw_request.url.path}: {reason}"
        raise VLLMValidationError(message, parameter=f"body.{EXTRA_ARGS_KEY}")


def _unavailable(engine_client: EngineClient | None) -> str | None:
    if engine_client is None:
        return "this server has no engine"
    config = engine_client.vllm_config
    if config.model_config.runner_type == "pooling":
        return "a pooling model samples no tokens"
    if config.speculative_config is not None and not config.use_v2_model_runner:
        return "vLLM's V1 runner drops it under speculative decoding; use the V2 runner or serve without speculation"
    return None


def _accepting_em_inf(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's handler `(request, raw_request)` with our field on its request model."""
    model = with_em_inf(get_type_hints(endpoint)["request"])

    @functools.wraps(endpoint)
    async def handler(request: Any, raw_request: Request) -> Any:
        settings: Settings = raw_request.app.state.em_inf
        metrics: Metrics = raw_request.app.state.em_inf_metrics
        try:
            params = apply_em_inf(request, settings)
        except ParamsError as error:
            metrics.request(UNKNOWN, "rejected")
            raise VLLMValidationError(str(error), parameter=error.field) from None
        if params is None:
            return await endpoint(request, raw_request)
        statistics = ReplyStatistics(params.stats, each_its_choice=raw_request.url.path.endswith("/v1/completions"))
        tallies.set(statistics.tallies)
        answer = endpoint(request, raw_request)
        return await _observed(answer, statistics, functools.partial(metrics.request, params.method))

    parameters = inspect.signature(endpoint).parameters
    typed = [parameters["request"].replace(annotation=model), parameters["raw_request"].replace(annotation=Request)]
    handler.__signature__ = inspect.Signature(typed)  # type: ignore[attr-defined]
    return handler


async def _observed(answer: Awaitable[Any], statistics: ReplyStatistics, outcome: Outcome) -> Any:
    """The endpoint's answer with its statistics, its outcome told."""
    try:
        response = await answer
    except CancelledError:
        outcome("aborted")
        raise
    except Exception as error:
        refused = isinstance(error, VLLMClientError) or getattr(error, "status_code", 500) < 500
        outcome("rejected" if refused else "failed")
        raise
    if response is None:  # vLLM's answer to a client that has gone
        outcome("aborted")
        return None
    return await with_statistics(response, statistics, outcome)


def _rebuilt(route: APIRoute, endpoint: Callable[..., Any] | None = None, dependencies: Sequence[Any] = ()) -> APIRoute:
    return Route(
        route.path,
        endpoint or route.endpoint,
        methods=list(route.methods),
        name=route.name,
        tags=route.tags,
        responses=route.responses,
        status_code=route.status_code,
        response_model=route.response_model,
        response_class=route.response_class,
        openapi_extra=route.openapi_extra,
        include_in_schema=route.include_in_schema,
        dependencies=[*route.dependencies, *dependencies],
    )
