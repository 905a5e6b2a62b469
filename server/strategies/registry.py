"""The strategies of /v1/chat/completions by name. A new one is a module in this package, listed in `AnyStrategy`."""

from collections.abc import Mapping
from typing import Any, get_args

from em_sampler.validation import ParamsError, as_whole, shorten, validate
from server.strategies.base import MAX_BRANCHES, MIN_BRANCHES, Strategy
from server.strategies.deepconf import DeepConf
from server.strategies.refinement import Refinement
from server.strategies.self_consistency import SelfConsistency

STRATEGY_KEY = "strategy"
AnyStrategy = SelfConsistency | Refinement | DeepConf
STRATEGIES: dict[str, type[Strategy]] = {model.model_fields["type"].default: model for model in get_args(AnyStrategy)}


def parse_strategy(value: object, max_branches: int = MAX_BRANCHES) -> Strategy | None:
    """Return the strategy that the field `strategy` of a request asks for, or None.

    Raises:
        ParamsError: if the value is wrong; names the field, the value received and what is allowed.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ParamsError(STRATEGY_KEY, f"got {shorten(value)}; must be an object")
    name = value.get("type")
    model = STRATEGIES.get(name) if isinstance(name, str) else None
    if model is None:
        raise ParamsError(f"{STRATEGY_KEY}.type", f"got {shorten(name)}; must be one of {', '.join(STRATEGIES)}")
    count = as_whole(value.get(model.limit_field))
    if isinstance(count, int) and not isinstance(count, bool) and not MIN_BRANCHES <= count <= max_branches:
        problem = f"got {shorten(count)}; this server allows an integer from {MIN_BRANCHES} up to {max_branches}"
        raise ParamsError(f"{STRATEGY_KEY}.{model.limit_field}", problem)
    strategy = validate(model, value, STRATEGY_KEY)
    if strategy.max_branches > max_branches:  # only a default can be: lower it to what the operator allows
        strategy = validate(model, {**value, model.limit_field: max_branches}, STRATEGY_KEY)
    return strategy


def describe_strategies(max_branches: int) -> dict[str, Any]:
    """Return the JSON schema of each strategy's fields, with the operator's limit, for `GET /v1/em_inf`."""
    schemas = {name: model.model_json_schema() for name, model in STRATEGIES.items()}
    for name, model in STRATEGIES.items():
        schemas[name]["properties"][model.limit_field]["maximum"] = max_branches
    return schemas
