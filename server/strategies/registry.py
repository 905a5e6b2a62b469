"""Test-time scaling on /v1/chat/completions: each strategy is a class in a file of its own, listed here."""

from collections.abc import Mapping
from typing import Any, get_args

from em_sampler.validation import ParamsError, shorten, validate
from server.strategies.base import MAX_BRANCHES, MIN_BRANCHES, Strategy
from server.strategies.deepconf import DeepConf
from server.strategies.refinement import Refinement
from server.strategies.self_consistency import SelfConsistency

STRATEGY_KEY = "strategy"
AnyStrategy = SelfConsistency | Refinement | DeepConf
STRATEGIES: dict[str, type[Strategy]] = {model.model_fields["type"].default: model for model in get_args(AnyStrategy)}


def parse_strategy(value: object, max_branches: int = MAX_BRANCHES) -> Strategy | None:
    """The strategy that a request's `strategy` asks for; None for none.

    Raises:
        ParamsError: naming the field, the value received and what is allowed.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ParamsError(STRATEGY_KEY, f"got {shorten(value)}; must be an object")
    name = value.get("type")
    model = STRATEGIES.get(name) if isinstance(name, str) else None
    if model is None:
        raise ParamsError(f"{STRATEGY_KEY}.type", f"got {shorten(name)}; must be one of {', '.join(STRATEGIES)}")
    size = value.get(model.limit_field)
    if isinstance(size, int) and not isinstance(size, bool) and not MIN_BRANCHES <= size <= max_branches:
        problem = f"got {shorten(size)}; this server allows an integer from {MIN_BRANCHES} up to {max_branches}"
        raise ParamsError(f"{STRATEGY_KEY}.{model.limit_field}", problem)
    strategy = validate(model, value, STRATEGY_KEY)
    if strategy.branches > max_branches:  # the default, lowered to what the operator allows
        strategy = validate(model, {**value, model.limit_field: max_branches}, STRATEGY_KEY)
    return strategy


def describe_strategies(max_branches: int) -> dict[str, Any]:
    """Each strategy's fields, defaults and limits, for `GET /v1/em_inf`."""
    described = {name: model.model_json_schema() for name, model in STRATEGIES.items()}
    for name, model in STRATEGIES.items():
        described[name]["properties"][model.limit_field]["maximum"] = max_branches
    return described
