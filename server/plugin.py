"""Routes and state: what vLLM's server calls, by the entry point `vllm.endpoint_plugins`, to become ours.

Core routes are rebuilt around vLLM's own handlers, never copied. Contract: vllm/plugins/endpoint_plugins/interface.py.
"""

import functools
import inspect
import time
from argparse import Namespace
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from http import HTTPStatus
from importlib import metadata
from typing import Any, get_type_hints

from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMClientError, VLLMValidationError

from em_sampler.params import EXTRA_ARGS_KEY, MAX_STEPS, Params, ParamsError
from em_sampler.plugin import EMInfLogitsProcessor
from em_sampler.supported import installed_vllm
from server.drain import Drain, drain_first, live, ready, refusal
from server.engine import multiply, running, tallies, watch
from server.metrics import UNKNOWN, Metrics, StrategyMetrics
from server.protocol import MAX_IN_FLIGHT, REFINEMENT_PROMPT, Settings, apply_em_inf, chosen_strategy, with_our_fields
from server.reply import Outcome, ReplyStatistics, with_statistics
from server.strategies import STRATEGIES, STRATEGY_KEY
from server.strategies.base import MAX_BRANCHES
from server.strategies.run import Places, Run, TooManyBranchesError

RETRY_AFTER = "1"  # second, for who finds no place
SAMPLING_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
CHAT = SAMPLING_ROUTES[0]  # the one with strategies


class Route(APIRoute):
    """A route that is closed while the server drains, and whose unreadable bodies are answered in OpenAI's shape, which
    vLLM gives to all errors but these."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Starlette's, from the request to the last byte of its reply, streamed or not."""
        drain: Drain = scope["app"].state.drain
        with drain.request() as admitted:
            await (super().handle if admitted else refusal())(scope, receive, send)

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
                app.router.routes[position] = _rebuilt(route, endpoint=_ours(route.endpoint, route.path == CHAT))
                self.rebuilt.append(route.path)
            else:
                app.router.routes[position] = _rebuilt(route, dependencies=[Depends(refuse_our_fields)])
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
        state.strategy_places = Places(getattr(args, "strategy_max_in_flight", MAX_IN_FLIGHT))
        state.drain = Drain()
        if engine_client is not None:
            drain_first(engine_client, state.drain)
            if not unavailable:
                await watch(engine_client, metrics)
            multiply(engine_client)


async def describe(raw_request: Request) -> dict[str, Any]:
    """What this server supports: methods with their fields, defaults and limits, and versions."""
    settings: Settings = raw_request.app.state.em_inf
    return settings.describe()


async def refuse_our_fields(raw_request: Request) -> None:
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
        raise _refused(raw_request, EXTRA_ARGS_KEY, reason)
    if body.get(STRATEGY_KEY) is not None:
        raise _refused(raw_request, STRATEGY_KEY, f"use {CHAT}")


def _refused(raw_request: Request, field: str, reason: str) -> VLLMValidationError:
    message = f"{field} is not supported on {raw_request.url.path}: {reason}"
    return VLLMValidationError(message, parameter=f"body.{field}")


def _unavailable(engine_client: EngineClient | None) -> str | None:
    if engine_client is None:
        return "this server has no engine"
    config = engine_client.vllm_config
    if config.model_config.runner_type == "pooling":
        return "a pooling model samples no tokens"
    if config.speculative_config is not None and not config.use_v2_model_runner:
        return "vLLM's V1 runner drops it under speculative decoding; use the V2 runner or serve without speculation"
    return None


def _ours(endpoint: Callable[..., Any], is_chat: bool) -> Callable[..., Any]:
    """vLLM's handler `(request, raw_request)` with our fields on its request model."""
    model = with_our_fields(get_type_hints(endpoint)["request"], strategies=is_chat)

    @functools.wraps(endpoint)
    async def handler(request: Any, raw_request: Request) -> Any:
        settings: Settings = raw_request.app.state.em_inf
        metrics: Metrics = raw_request.app.state.em_inf_metrics
        try:
            params = apply_em_inf(request, settings)
        except ParamsError as error:
            metrics.request(UNKNOWN, "rejected")
            raise VLLMValidationError(str(error), parameter=error.field) from None
        if not is_chat and getattr(request, STRATEGY_KEY, None) is not None:
            raise _refused(raw_request, STRATEGY_KEY, f"use {CHAT}")
        try:
            run = _run(request, raw_request, params) if is_chat and request.strategy is not None else None
        except TooManyBranchesError as error:
            return _busy(error)
        if params is None and run is None:
            return await endpoint(request, raw_request)
        statistics = ReplyStatistics(params.stats if params else "none", raw_request.url.path == "/v1/completions", run)
        tallies.set(statistics.tallies)
        running.set(run)

        def ended(outcome: str) -> None:
            if params:
                metrics.request(params.method, outcome)
            if run:
                run.close()

        return await _observed(endpoint(request, raw_request), statistics, ended)

    parameters = inspect.signature(endpoint).parameters
    typed = [parameters["request"].replace(annotation=model), parameters["raw_request"].replace(annotation=Request)]
    handler.__signature__ = inspect.Signature(typed)  # type: ignore[attr-defined]
    return handler


def _run(request: Any, raw_request: Request, params: Params | None) -> Run | None:
    """The request's strategy, its places taken."""
    state = raw_request.app.state
    try:
        strategy = chosen_strategy(request, params, state.em_inf)
    except ParamsError as error:
        raise VLLMValidationError(str(error), parameter=error.field) from None
    if strategy is None:
        return None

    async def render(reply: str) -> Any | None:
        turns = [{"role": "assistant", "content": reply}, {"role": "user", "content": state.em_inf.refinement_prompt}]
        fields = {"messages": [*request.messages, *turns], "add_generation_prompt": True}
        again = request.model_copy(update=fields | {"continue_final_message": False})
        try:
            rendered = await state.openai_serving_chat.render_chat_request(again)
        except VLLMClientError:
            return None  # longer than the context
        return rendered[1][0] if isinstance(rendered, tuple) else None

    def head() -> dict[str, Any]:
        identity = raw_request.state.request_metadata.request_id  # vLLM's, made by the time there is a stream
        model = request.model or state.em_inf_metrics.model
        return {"id": identity, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}

    return Run(strategy, state.strategy_places, state.strategy_metrics, render, head)


def _busy(error: TooManyBranchesError) -> Response:
    kind = HTTPStatus.TOO_MANY_REQUESTS
    content = {"message": str(error), "type": kind.phrase, "param": f"body.{STRATEGY_KEY}", "code": kind.value}
    return JSONResponse({"error": content}, kind.value, headers={"Retry-After": RETRY_AFTER})


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
