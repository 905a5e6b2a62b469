"""Routes and their state: the plugin that vLLM's server loads by the entry point `vllm.endpoint_plugins`.

vLLM's routes are rebuilt around their own handlers, never copied. Contract: vllm/plugins/endpoint_plugins/interface.py.
"""

from argparse import Namespace
from collections.abc import Callable, Coroutine, Sequence
from email.message import Message
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from vllm.engine.protocol import EngineClient

import em_sampler
from em_sampler.params import EXTRA_ARGS_KEY
from em_sampler.validation import ParamsError
from em_sampler.vllm_plugin.processor import EMInfLogitsProcessor
from em_sampler.vllm_plugin.version import installed_vllm
from server import guards
from server.admission import BranchLimit
from server.body_limits import BodySizeLimit, check_items, check_json
from server.drain import Drain, bound_close, drain_before_shutdown
from server.engine import ask_for_transforms, install_stats, install_strategies
from server.errors import bad_request, shutting_down, unreadable_body, unsupported_field
from server.fail_fast import stop_at_first_error
from server.handler import with_em_inf
from server.health import live, ready
from server.protocol import CHAT_ROUTE, SAMPLING_ROUTES, Settings
from server.stats.metrics import Metrics
from server.strategies.metrics import StrategyMetrics
from server.strategies.registry import STRATEGIES, STRATEGY_KEY


class Route(APIRoute):
    """A POST route that answers 503 while the server drains, and unparsable bodies in OpenAI's error shape.

    vLLM gives that shape to all errors but these.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, counted as in flight until the last byte of its response, streamed or not."""
        drain: Drain = scope["app"].state.drain
        bound_close(scope["app"].state)
        with drain.admit() as admitted:
            if admitted:
                await drain.serve(super().handle, scope, receive, send)
            else:
                await shutting_down()(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, with a body that it cannot parse answered by vLLM's 400."""
        handle = super().get_route_handler()

        async def handle_or_reject(request: Request) -> Response:
            try:
                if _is_json(request):
                    check_json(await request.body())
                    check_items(await _json_body(request))
            except ParamsError as error:
                raise bad_request(error) from None
            try:
                return await handle(request)
            except HTTPException as error:
                # Handlers raise FastAPI's subclass, which vLLM has an error handler for; it has none for Starlette's.
                if type(error) is not HTTPException or error.status_code != HTTPStatus.BAD_REQUEST:
                    raise
                raise unreadable_body(error) from None

        return handle_or_reject


class EMInfEndpoints:
    """The endpoint plugin: our fields on the sampling routes, rejected on all others; `GET /v1/em_inf`; probes."""

    name = "em_inf"
    required_tasks = (
        None  # load it for pooling models too: their requests get an error that says why em_inf cannot work
    )

    def __init__(self) -> None:
        self.app: FastAPI
        self.rebuilt: list[str] = []  # the sampling routes that were found

    def attach_router(self, app: FastAPI) -> None:
        """Rebuild the POST routes in place (before vLLM 0.32 an appended route would never match)."""
        self.app = app
        for position, route in enumerate(app.router.routes):
            if not isinstance(route, APIRoute) or "POST" not in route.methods:
                continue
            stop_at_first_error(route)
            if route.path in SAMPLING_ROUTES:
                handler = with_em_inf(route.endpoint, route.path)
                app.router.routes[position] = _rebuild_route(route, endpoint=handler)
                self.rebuilt.append(route.path)
            else:
                app.router.routes[position] = _rebuild_route(route, dependencies=[Depends(reject_em_inf_fields)])
        app.add_middleware(BodySizeLimit)
        app.get("/v1/em_inf")(describe)
        app.get("/health/live", response_class=Response)(live)
        app.get("/health/ready", response_class=Response)(ready)

    async def init_state(self, engine_client: EngineClient | None, state: Any, args: Namespace) -> None:
        """Set what the routes find in `state`, and wrap the engine client.

        Raises:
            RuntimeError: if em_inf, or the operator's default for it, cannot work on this engine.
        """
        state.em_inf = settings = await self._settings(engine_client, args)
        EMInfLogitsProcessor.max_steps = settings.em_inf_max_steps
        model = (args.served_model_name or [args.model])[0]
        state.em_inf_metrics = metrics = Metrics(model, transforms=settings.transforms)
        state.strategy_metrics = StrategyMetrics(model, list(STRATEGIES))
        state.branch_limit = BranchLimit(settings.strategy_max_in_flight)
        state.drain = Drain()
        if self.app.openapi_url:
            self.app.openapi()  # takes a second or two: now, and not on the event loop at the first request for it
        if engine_client is not None:
            EMInfLogitsProcessor.seeds_end_engine = guards.seeds_end_engine(engine_client.vllm_config)
            guards.limit_engine(engine_client.vllm_config)
            drain_before_shutdown(engine_client, state.drain)
            if not settings.unavailable:
                await install_stats(engine_client, metrics)
            install_strategies(engine_client)

    async def _settings(self, engine_client: EngineClient | None, args: Namespace) -> Settings:
        unavailable = _unavailable(engine_client)
        transforms = await ask_for_transforms(engine_client) if engine_client and not unavailable else []
        versions = {"em-inf-server": em_sampler.__version__, "vllm": installed_vllm() or ""}
        settings = Settings.from_args(args, unavailable=unavailable, transforms=transforms, versions=versions)
        if not unavailable and not self.rebuilt:
            raise RuntimeError(f"none of {', '.join(SAMPLING_ROUTES)} was found in vLLM's app: em_inf would be ignored")
        if unavailable and settings.em_inf_default:
            raise RuntimeError(f"--em-inf-default cannot work here: {unavailable}")
        return settings


async def describe(raw_request: Request) -> dict[str, Any]:
    """Describe what this server supports: methods with their fields, defaults and limits, transforms, and versions."""
    settings: Settings = raw_request.app.state.em_inf
    return settings.describe()


async def reject_em_inf_fields(raw_request: Request) -> None:
    """Reject `em_inf` and `strategy` on a route that would ignore them silently.

    Raises:
        VLLMValidationError: (400) if the body has such a field.
    """
    body = await _json_body(raw_request) or await _form_body(raw_request)
    if not isinstance(body, dict):
        return
    path = raw_request.scope["route"].path
    settings: Settings = raw_request.app.state.em_inf
    if body.get(EXTRA_ARGS_KEY) not in (None, False):
        reason = settings.unavailable or f"use one of {', '.join(SAMPLING_ROUTES)}"
        raise unsupported_field(path, EXTRA_ARGS_KEY, reason)
    if body.get(STRATEGY_KEY) is not None:
        raise unsupported_field(path, STRATEGY_KEY, f"use {CHAT_ROUTE}")


async def _json_body(raw_request: Request) -> Any:
    """Return the body, parsed once for all who ask; None if it is no JSON, which the route itself answers."""
    if not _is_json(raw_request):
        return None
    try:
        return await raw_request.json()
    except (ValueError, RecursionError):
        return None


async def _form_body(raw_request: Request) -> dict[str, Any]:
    """Return a form's fields, an object's under its own name: `em_inf[steps]` is one of `em_inf`; {} if it is none."""
    try:
        form = await raw_request.form()
    except HTTPException:
        return {}  # the route itself answers
    return {name.partition("[")[0]: value for name, value in form.multi_items()}


def _is_json(raw_request: Request) -> bool:
    """Return whether FastAPI reads the body as JSON, by the rule of `fastapi.routing.get_request_handler`."""
    content_type = Message()
    content_type["content-type"] = raw_request.headers.get("content-type", "")
    subtype = content_type.get_content_subtype()
    return content_type.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _unavailable(engine_client: EngineClient | None) -> str | None:
    """Return why no request can use em_inf on this engine, or None if requests can."""
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
