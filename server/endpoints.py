"""Routes and state: what vLLM's server calls, by the entry point `vllm.endpoint_plugins`, to become ours.

Core routes are rebuilt around vLLM's own handlers, never copied. Contract: vllm/plugins/endpoint_plugins/interface.py.
"""

from argparse import Namespace
from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from importlib import metadata
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError

from em_sampler.params import EXTRA_ARGS_KEY, MAX_STEPS
from em_sampler.vllm_plugin.processor import EMInfLogitsProcessor
from em_sampler.vllm_plugin.version import installed_vllm
from server.admission import BranchLimit
from server.drain import Drain, drain_before_shutdown, shutting_down_response
from server.engine import install_stats, install_strategies
from server.errors import unsupported_field
from server.handler import CHAT_ROUTE, with_em_inf
from server.health import live, ready
from server.protocol import MAX_IN_FLIGHT, REFINEMENT_PROMPT, Settings
from server.stats.metrics import Metrics
from server.strategies.base import MAX_BRANCHES
from server.strategies.metrics import StrategyMetrics
from server.strategies.registry import STRATEGIES, STRATEGY_KEY

SAMPLING_ROUTES = (CHAT_ROUTE, "/v1/completions", "/v1/responses")


class Route(APIRoute):
    """A route that is closed while the server drains, and whose unreadable bodies are answered in OpenAI's shape, which
    vLLM gives to all errors but these."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Starlette's, from the request to the last byte of its reply, streamed or not."""
        drain: Drain = scope["app"].state.drain
        with drain.request() as admitted:
            await (super().handle if admitted else shutting_down_response())(scope, receive, send)

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
    """The endpoint plugin: our fields on the sampling routes, a refusal on the others, `GET /v1/em_inf`, and probes."""

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
                app.router.routes[position] = _rebuild_route(
                    route, endpoint=with_em_inf(route.endpoint, route.path == CHAT_ROUTE)
                )
                self.rebuilt.append(route.path)
            else:
                app.router.routes[position] = _rebuild_route(route, dependencies=[Depends(reject_em_inf_fields)])
        app.get("/v1/em_inf")(describe)
        app.get("/health/live", response_class=Response)(live)
        app.get("/health/ready", response_class=Response)(ready)

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
            max_branches=getattr(args, "strategy_max_branches", MAX_BRANCHES),
            refinement_prompt=getattr(args, "strategy_refinement_prompt", REFINEMENT_PROMPT),
            unavailable=unavailable,
            versions={"em-inf-server": metadata.version("em-inf-server"), "vllm": installed_vllm() or ""},
        )
        EMInfLogitsProcessor.max_steps = settings.max_steps
        model = (args.served_model_name or [args.model])[0]
        state.em_inf_metrics = metrics = Metrics(model)
        state.strategy_metrics = StrategyMetrics(model, list(STRATEGIES))
        state.branch_limit = BranchLimit(getattr(args, "strategy_max_in_flight", MAX_IN_FLIGHT))
        state.drain = Drain()
        if engine_client is not None:
            drain_before_shutdown(engine_client, state.drain)
            if not unavailable:
                await install_stats(engine_client, metrics)
            install_strategies(engine_client)


async def describe(raw_request: Request) -> dict[str, Any]:
    """What this server supports: methods with their fields, defaults and limits, and versions."""
    settings: Settings = raw_request.app.state.em_inf
    return settings.describe()


async def reject_em_inf_fields(raw_request: Request) -> None:
    """400 for `em_inf` or `strategy` where it would be ignored in silence.

    Raises:
        VLLMValidationError: where the body has such a field.
    """
    if not raw_request.headers.get("content-type", "").startswith("application/json"):
        return
    try:
        body = await raw_request.json()
    except (ValueError, RecursionError):
        return  # the route itself says what is wrong with it
    if not isinstance(body, dict):
        return
    settings: Settings = raw_request.app.state.em_inf
    if body.get(EXTRA_ARGS_KEY) not in (None, False):
        reason = settings.unavailable or f"use one of {', '.join(SAMPLING_ROUTES)}"
        raise unsupported_field(raw_request, EXTRA_ARGS_KEY, reason)
    if body.get(STRATEGY_KEY) is not None:
        raise unsupported_field(raw_request, STRATEGY_KEY, f"use {CHAT_ROUTE}")


def _unavailable(engine_client: EngineClient | None) -> str | None:
    if engine_client is None:
        return "this server has no engine"
    config = engine_client.vllm_config
    if config.model_config.runner_type == "pooling":
        return "a pooling model samples no tokens"
    if config.speculative_config is not None and not config.use_v2_model_runner:
        return "vLLM's V1 runner drops it under speculative decoding; use the V2 runner or serve without speculation"
    return None


def _rebuild_route(
    route: APIRoute, endpoint: Callable[..., Any] | None = None, dependencies: Sequence[Any] = ()
) -> APIRoute:
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
