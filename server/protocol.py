"""The fields `em_inf` and `strategy` of vLLM's request models, and how a request's values for them are resolved.

Knows request fields and settings; the request itself is handled in handler.py. Contract: docs/http.md.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from pydantic import BaseModel, Field, SkipValidation, create_model

from em_sampler.params import (
    EXTRA_ARGS_KEY,
    MAX_STEPS,
    METHODS,
    Params,
    as_written,
    flat_keys,
    from_extra_args,
    parse_params,
    with_step_limit,
)
from em_sampler.validation import ParamsError, shorten
from server.misspelt import refuse_misspelt, refuse_misspelt_flat
from server.strategies.base import MAX_BRANCHES, Strategy
from server.strategies.registry import STRATEGY_KEY, AnyStrategy, describe_strategies, parse_strategy

CHAT_ROUTE = "/v1/chat/completions"  # the only route with strategies
COMPLETIONS_ROUTE = "/v1/completions"
SAMPLING_ROUTES = (CHAT_ROUTE, COMPLETIONS_ROUTE, "/v1/responses")

# Validated by `parse_params` and `parse_strategy`, whose errors name the field, the value and the range. These types
# are for OpenAPI.
EMInfField = SkipValidation[Params | bool | None]
StrategyField = SkipValidation[AnyStrategy | None]

EM_INF_DESCRIPTION = (
    "Entropy minimisation for this request: settings, true for the server's default, false for none. "
    "`GET /v1/em_inf` describes what this server supports."
)
STRATEGY_DESCRIPTION = "Test-time scaling for this request: several samples or rounds, of which one becomes the reply."
REFINEMENT_PROMPT = (
    "Check your answer above step by step. Correct every mistake, improve what can be improved, and give the answer "
    "again in full, in the same form."
)


@dataclass(frozen=True)
class Settings:
    """What the operator chose, and what this engine can do.

    The first fields have the names of em-serve's flags (server/cli.py), which take their defaults from here.
    """

    em_inf_default: Params | None = None  # for requests without `em_inf`
    em_inf_max_steps: int = MAX_STEPS
    strategy_max_branches: int = MAX_BRANCHES  # of one request
    strategy_max_in_flight: int = 512  # branches of all requests together, in one API server
    strategy_refinement_prompt: str = REFINEMENT_PROMPT
    max_request_bytes: int = 16 << 20  # of a body: a larger one of JSON would hold up the others for more than a second
    unavailable: str | None = None  # why no request can use em_inf here
    transforms: Sequence[Mapping[str, str]] = ()  # those of the workers: {"transform": name, "device": type}
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_args(cls, args: Namespace, **others: Any) -> Self:
        """Take the flags from `args`; those that it lacks, since `vllm serve` parsed it, keep their defaults."""
        flags = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        return cls(**flags | others)

    def describe(self) -> dict[str, Any]:
        """Return the body of `GET /v1/em_inf`."""
        methods = {name: model.model_json_schema()["properties"] for name, model in METHODS.items()}
        steps = methods["em_inf"]["steps"]
        steps["maximum"] = self.em_inf_max_steps
        steps["default"] = min(steps["default"], self.em_inf_max_steps)
        return {
            "object": "em_inf",
            "available": self.unavailable is None,
            "unavailable_because": self.unavailable,
            "methods": methods,
            "default": self.em_inf_default and self.em_inf_default.model_dump(),
            "strategies": describe_strategies(self.strategy_max_branches),
            "transforms": list(self.transforms),
            "versions": dict(self.versions),
        }


def with_our_fields(model: type[BaseModel], strategies: bool) -> type[BaseModel]:
    """Return vLLM's request `model` with the field `em_inf`, and with `strategy` if `strategies` is set."""
    added: dict[str, Any] = {EXTRA_ARGS_KEY: (EMInfField, Field(default=None, description=EM_INF_DESCRIPTION))}
    if strategies:
        added[STRATEGY_KEY] = (StrategyField, Field(default=None, description=STRATEGY_DESCRIPTION))
    return create_model(f"EMInf{model.__name__}", __base__=model, **added)


def apply_em_inf(request: Any, settings: Settings) -> Params | None:
    """Resolve the request's `em_inf` and write it to `vllm_xargs`, which vLLM passes to the sampler as extra_args.

    Returns:
        The params written, or None if the request samples as by plain vLLM.

    Raises:
        ParamsError: if the settings are wrong or cannot work with this request.
    """
    refuse_misspelt(getattr(request, "model_extra", None) or {})
    xargs = dict(request.vllm_xargs or {})
    refuse_misspelt_flat(xargs)
    flat = {key: xargs.pop(key) for key in (EXTRA_ARGS_KEY, *flat_keys(xargs)) if key in xargs}
    params = _resolve(request.em_inf, flat, settings)
    # If the request did not ask for em_inf, params are the operator's default: that gives way if it cannot work.
    requested = request.em_inf is not None or bool(flat)
    if params and (conflict := settings.unavailable or _conflict(request)):
        if requested:
            raise ParamsError(f"body.{EXTRA_ARGS_KEY}", conflict)
        params = None
    if params and params.stats != "none" and getattr(request, "background", False):
        if requested:
            raise ParamsError(
                f"body.{EXTRA_ARGS_KEY}.stats", f"got {shorten(params.stats)}; a background response has none"
            )
        params = params.model_copy(update={"stats": "none"})
    if params:
        xargs[EXTRA_ARGS_KEY] = params.model_dump()
    request.vllm_xargs = xargs or None
    return params


def resolve_strategy(request: Any, params: Params | None, settings: Settings) -> Strategy | None:
    """Return the strategy of a chat request whose em_inf resolved to `params`.

    Raises:
        ParamsError: if the settings are wrong or cannot work with this request.
    """
    try:
        strategy = parse_strategy(request.strategy, settings.strategy_max_branches)
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
        problem = 'got "entropy"; needs the request\'s own entropies: `em_inf` with `stats`'
        raise ParamsError(f"body.{STRATEGY_KEY}.weights", problem)
    return strategy


def _resolve(value: object, flat: Mapping[str, Any], settings: Settings) -> Params | None:
    source = "body" if value is not None else "body.vllm_xargs"
    try:
        if value is not None and flat:
            raise ParamsError(EXTRA_ARGS_KEY, f"give either `{EXTRA_ARGS_KEY}` or its form in vllm_xargs, not both")
        default = settings.em_inf_default
        params = from_extra_args(flat, default) if value is None else parse_params(value, default)
        return with_step_limit(params, settings.em_inf_max_steps)
    except ParamsError as error:
        raise ParamsError(f"{source}.{as_written(error, flat).field}", error.problem) from None


def _conflict(request: Any) -> str | None:
    if getattr(request, "use_beam_search", False):
        return "cannot be combined with use_beam_search: beam search does not sample its tokens"
    return None
