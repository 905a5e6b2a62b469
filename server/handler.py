"""What happens to one sampling request: its settings checked, vLLM's handler called, stats and strategy in the reply.

Routes are in endpoints.py, the fields in protocol.py, the reply in response.py.
"""

import functools
import inspect
import time
from asyncio import CancelledError
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, get_type_hints

from fastapi import Request
from starlette.responses import Response
from vllm.exceptions import VLLMClientError

from em_sampler.params import Params
from em_sampler.validation import ParamsError
from server.admission import TooManyBranchesError
from server.engine import request_stats_var, strategy_run_var
from server.errors import bad_request, error_response, unsupported_field
from server.protocol import Settings, apply_em_inf, chosen_strategy, with_our_fields
from server.response import Outcome, ReplyStatistics, with_statistics
from server.stats.metrics import UNKNOWN_METHOD, Metrics
from server.strategies.registry import STRATEGY_KEY
from server.strategies.run import StrategyRun

CHAT_ROUTE = "/v1/chat/completions"  # the one with strategies
RETRY_AFTER_S = "1"


def with_em_inf(endpoint: Callable[..., Any], is_chat: bool) -> Callable[..., Any]:
    """vLLM's handler `(request, raw_request)` with our fields on its request model."""
    model = with_our_fields(get_type_hints(endpoint)["request"], strategies=is_chat)

    @functools.wraps(endpoint)
    async def handler(request: Any, raw_request: Request) -> Any:
        settings: Settings = raw_request.app.state.em_inf
        metrics: Metrics = raw_request.app.state.em_inf_metrics
        try:
            params = apply_em_inf(request, settings)
        except ParamsError as error:
            metrics.observe_request(UNKNOWN_METHOD, "rejected")
            raise bad_request(error) from None
        if not is_chat and getattr(request, STRATEGY_KEY, None) is not None:
            raise unsupported_field(raw_request, STRATEGY_KEY, f"use {CHAT_ROUTE}")
        try:
            run = _strategy_run(request, raw_request, params) if is_chat and request.strategy is not None else None
        except TooManyBranchesError as error:
            return _too_many_branches(error)
        if params is None and run is None:
            return await endpoint(request, raw_request)
        statistics = ReplyStatistics(params.stats if params else "none", raw_request.url.path == "/v1/completions", run)
        request_stats_var.set(statistics.tallies)
        strategy_run_var.set(run)

        def ended(outcome: str) -> None:
            if params:
                metrics.observe_request(params.method, outcome)
            if run:
                run.close()

        return await _with_outcome(endpoint(request, raw_request), statistics, ended)

    parameters = inspect.signature(endpoint).parameters
    typed = [parameters["request"].replace(annotation=model), parameters["raw_request"].replace(annotation=Request)]
    handler.__signature__ = inspect.Signature(typed)  # type: ignore[attr-defined]
    return handler


def _strategy_run(request: Any, raw_request: Request, params: Params | None) -> StrategyRun | None:
    """The request's strategy, its places taken."""
    state = raw_request.app.state
    try:
        strategy = chosen_strategy(request, params, state.em_inf)
    except ParamsError as error:
        raise bad_request(error) from None
    if strategy is None:
        return None

    async def next_prompt(reply: str) -> Any | None:
        turns = [{"role": "assistant", "content": reply}, {"role": "user", "content": state.em_inf.refinement_prompt}]
        fields = {"messages": [*request.messages, *turns], "add_generation_prompt": True}
        again = request.model_copy(update=fields | {"continue_final_message": False})
        try:
            rendered = await state.openai_serving_chat.render_chat_request(again)
        except VLLMClientError:
            return None  # longer than the context
        return rendered[1][0] if isinstance(rendered, tuple) else None

    def chunk_header() -> dict[str, Any]:
        identity = raw_request.state.request_metadata.request_id  # vLLM's, made by the time there is a stream
        model = request.model or state.em_inf_metrics.model
        return {"id": identity, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}

    return StrategyRun(strategy, state.branch_limit, state.strategy_metrics, next_prompt, chunk_header)


def _too_many_branches(error: TooManyBranchesError) -> Response:
    headers = {"Retry-After": RETRY_AFTER_S}
    return error_response(HTTPStatus.TOO_MANY_REQUESTS, str(error), f"body.{STRATEGY_KEY}", headers)


async def _with_outcome(answer: Awaitable[Any], statistics: ReplyStatistics, outcome: Outcome) -> Any:
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
