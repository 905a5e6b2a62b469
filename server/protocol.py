"""The fields `em_inf` and `strategy` of vLLM's request models, and what a request makes of them: docs/http.md.

Knows request fields and settings; routes are in plugin.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, Field, SkipValidation, create_model

from em_sampler.params import (
    EXTRA_ARGS_KEY,
    FLAT_PREFIX,
    MAX_STEPS,
    METHODS,
    Params,
    from_extra_args,
    parse_params,
    with_step_limit,
)
from em_sampler.validation import ParamsError, shorten
from server.strategies.base import MAX_BRANCHES, Strategy
from server.strategies.registry import STRATEGY_KEY, AnyStrategy, describe_strategies, parse_strategy

# Validated by `parse`, whose errors name the field, the value and the range; the type is there for OpenAPI.
EMInfField = SkipValidation[Params | bool | None]
StrategyField = SkipValidation[AnyStrategy | None]  # the same: by `parse_strategy`
STRATEGY_DESCRIPTION = "Test-time scaling for this request: several samples or rounds, of which one becomes the reply."
MAX_IN_FLIGHT = 512  # branches of all requests together, where the operator says nothing else
REFINEMENT_PROMPT = (
    "Check your answer above step by step. Correct every mistake, improve what can be improved, and give the answer "
    "again in full, in the same form."
)
DESCRIPTION = (
    "Entropy minimisation for this request: settings, true for the server's default, false for none. "
    "`GET /v1/em_inf` tells what this server supports."
)


@dataclass(frozen=True)
class Settings:
    """What the operator chose, and what this engine can do."""

    default: Params | None = None  # for requests that say nothing
    max_steps: int = MAX_STEPS
    max_branches: int = MAX_BRANCHES  # of one request's strategy
    refinement_prompt: str = REFINEMENT_PROMPT
    unavailable: str | None = None  # why no request can use em_inf here
    versions: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The answer to `GET /v1/em_inf`."""
        methods = {name: model.model_json_schema()["properties"] for name, model in METHODS.items()}
        methods["em_inf"]["steps"]["maximum"] = self.max_steps
        methods["em_inf"]["steps"]["default"] = min(methods["em_inf"]["steps"]["default"], self.max_steps)
        return {
            "object": "em_inf",
            "available": self.unavailable is None,
            "unavailable_because": self.unavailable,
            "methods": methods,
            "default": self.default and self.default.model_dump(),
            "strategies": describe_strategies(self.max_branches),
            "versions": dict(self.versions),
        }


def with_our_fields(model: type[BaseModel], strategies: bool) -> type[BaseModel]:
    """vLLM's request model with the field `em_inf`, and `strategy` where `strategies` says so."""
    fields: dict[str, Any] = {EXTRA_ARGS_KEY: (EMInfField, Field(default=None, description=DESCRIPTION))}
    if strategies:
        fields[STRATEGY_KEY] = (StrategyField, Field(default=None, description=STRATEGY_DESCRIPTION))
    return create_model(f"EMInf{model.__name__}", __base__=model, **fields)


def apply_em_inf(request: Any, settings: Settings) -> Params | None:
    """Resolve the request's `em_inf` and leave it in `vllm_xargs`, which vLLM hands on to the sampler's extra_args.

    Returns:
        What was left there, if anything.

    Raises:
        ParamsError: for settings that are wrong or cannot work with this request.
    """
    xargs = dict(request.vllm_xargs or {})
    flat = {key: xargs.pop(key) for key in list(xargs) if key == EXTRA_ARGS_KEY or key.startswith(FLAT_PREFIX)}
    params = _resolve(request.em_inf, flat, settings)
    asked = request.em_inf is not None or bool(flat)  # the operator's default gives way where it cannot work
    if params and (conflict := settings.unavailable or _conflict(request)):
        if asked:
            raise ParamsError(f"body.{EXTRA_ARGS_KEY}", conflict)
        params = None
    if params and params.stats != "none" and getattr(request, "background", False):
        if asked:
            raise ParamsError(f"body.{EXTRA_ARGS_KEY}.stats", f"got {params.stats!r}; a background response has none")
        params = params.model_copy(update={"stats": "none"})
    if params:
        xargs[EXTRA_ARGS_KEY] = params.model_dump()
    request.vllm_xargs = xargs or None
    return params


def chosen_strategy(request: Any, params: Params | None, settings: Settings) -> Strategy | None:
    """The strategy of a chat request that uses em_inf with `params`.

    Raises:
        ParamsError: for settings that are wrong or cannot work with this request.
    """
    try:
        strategy = parse_strategy(request.strategy, settings.max_branches)
    except ParamsError as error:
        raise ParamsError(f"body.{error.field}", error.problem) from None
    if strategy is None:
        return None
    if (request.n or 1) > 1:
        raise ParamsError("body.n", f"got {shorten(request.n)}; a strategy makes its own samples and replies with one")
    if request.use_beam_search:
        raise ParamsError("body.use_beam_search", f"got true; cannot be combined with {strategy.type}")
    if request.tools and request.tool_choice != "none":
        raise ParamsError("body.tools", f"cannot be combined with {strategy.type}, which compares the text of replies")
    if getattr(strategy, "weights", "equal") == "entropy" and (params is None or params.stats == "none"):
        problem = "got 'entropy'; needs the request's own entropies: `em_inf` with `stats`"
        raise ParamsError(f"body.{STRATEGY_KEY}.weights", problem)
    return strategy


def _resolve(value: object, flat: Mapping[str, Any], settings: Settings) -> Params | None:
    origin = "body" if value is not None else "body.vllm_xargs"
    try:
        if value is not None and flat:
            raise ParamsError(EXTRA_ARGS_KEY, f"give either `{EXTRA_ARGS_KEY}` or its form in vllm_xargs, not both")
        default = settings.default
        params = from_extra_args(flat, default) if value is None else parse_params(value, default)
        return with_step_limit(params, settings.max_steps)
    except ParamsError as error:
        raise ParamsError(f"{origin}.{error.field}", error.problem) from None


def _conflict(request: Any) -> str | None:
    if getattr(request, "use_beam_search", False):
        return "cannot be combined with use_beam_search: beam search does not sample its tokens"
    return None
