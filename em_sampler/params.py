"""The params of a request: one frozen, validated class per method, with its defaults.

Knows nothing of tensors, vLLM or HTTP. Symbols and defaults of EM-INF and adaptive temperature: arXiv 2505.15134,
section 4 and appendix A; of the methods that remove tokens: the paper that each class names.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from em_sampler.validation import ParamsError, shorten, validate

EXTRA_ARGS_KEY = "em_inf"
FLAT_PREFIX = "em_inf_"
RETURN_ADDRESS_KEY = "em_return_address"  # also in extra_args, set by the server alone: stats.aggregator.ReturnAddress

MAX_FLAT_KEYS = 32  # more than all methods have fields

MAX_THRESHOLD = 20.0  # nats; above the entropy of any vocabulary in use (ln 10^8 = 18.4)
MAX_STEPS = 64
MAX_TOP = 20
CUT = -1  # in statistics, the steps of a token whose method removed others: it took none, but changed the distribution
MAX_LEARNING_RATE = 10.0
MAX_KL_WEIGHT = 10.0
MAX_SIGMAS = 20.0
MIN_TEMPERATURE = 1e-3
MAX_TEMPERATURE = 10.0

Temperature = Annotated[float, Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE, allow_inf_nan=False)]


class _Params(BaseModel):
    """What the params of all methods have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    stats: Literal["none", "summary", "tokens"] = Field(
        default="none", description="Entropies in the response: none, means over each choice, or every token's as well."
    )
    top: int = Field(
        default=0,
        ge=0,
        le=MAX_TOP,
        description='With stats "tokens", each token\'s likeliest candidates after the method: this many.',
    )

    @field_validator("top")
    @classmethod
    def _top_is_returned(cls, top: int, info: ValidationInfo) -> int:
        if top and info.data.get("stats", "tokens") != "tokens":
            raise ValueError(f'got {top}; must be 0 without `stats` "tokens", which would return the candidates')
        return top


class EMInfParams(_Params):
    """The params of EM-INF: gradient steps on a token's logits until their entropy falls below `threshold`."""

    method: Literal["em_inf"] = "em_inf"
    threshold: float = Field(
        default=0.3, ge=0, le=MAX_THRESHOLD, description="Entropy in nats below which a token is left alone (delta)."
    )
    steps: int = Field(default=5, ge=0, le=MAX_STEPS, description="At most this many gradient steps per token.")
    learning_rate: float = Field(
        default=0.1, gt=0, le=MAX_LEARNING_RATE, description="Step size, in units of a logit under adam."
    )
    kl_weight: float = Field(
        default=0.001, ge=0, le=MAX_KL_WEIGHT, description="Weight of KL(p0 || p), which keeps p close to the model."
    )
    optimizer: Literal["adam", "sgd"] = Field(
        default="adam", description="adam: the released code. sgd: plain gradient steps, the paper's text."
    )


class AdaptiveTemperatureParams(_Params):
    """The params of the paper's baseline: the largest temperature that brings a token's entropy down to a target."""

    method: Literal["adaptive_temperature"] = "adaptive_temperature"
    ratio: float = Field(
        default=0.5, ge=0, le=1, description="Target entropy as a share of the token's own, floored at `threshold`."
    )
    threshold: float = Field(
        default=0.1, ge=0, le=MAX_THRESHOLD, description="Entropy in nats at or below which a token is left alone."
    )
    min_temperature: Temperature = Field(default=0.01, description="Lower bound of the search.")
    max_temperature: Temperature = Field(default=1.0, description="Upper bound of the search.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_temperature > self.max_temperature:
            raise ValueError(
                f"min_temperature {self.min_temperature:g} is above max_temperature {self.max_temperature:g}"
            )
        return self


class MeasureParams(_Params):
    """The params of method "none": measure each token's entropy and change nothing, as a baseline for the others."""

    method: Literal["none"] = "none"


class PLessParams(_Params):
    """The params of p-less sampling (arXiv 2509.23234): keep tokens as likely as two independent samples are equal."""

    method: Literal["p_less"] = "p_less"
    normalized: bool = Field(
        default=False, description="Scale the bound, sum p^2, so that a uniform distribution loses no token."
    )


class TopHParams(_Params):
    """The params of top-H sampling (arXiv 2509.02510): keep the likeliest tokens, up to a share of the entropy."""

    method: Literal["top_h"] = "top_h"
    alpha: float = Field(
        default=0.4, gt=0, le=1, description="Entropy of the kept tokens, at most, as a share of the token's own."
    )


class TopNSigmaParams(_Params):
    """The params of top-n-sigma sampling (arXiv 2411.07641): keep logits within `n` deviations of the highest."""

    method: Literal["top_n_sigma"] = "top_n_sigma"
    n: float = Field(default=1.0, gt=0, le=MAX_SIGMAS, description="Distance, in standard deviations of the logits.")


class GreedyBelowParams(_Params):
    """The params of greedy-threshold sampling (arXiv 2510.05987): be greedy exactly if the model is unsure."""

    method: Literal["greedy_below"] = "greedy_below"
    p_max: float = Field(
        default=0.3, gt=0, le=1, description="Probability of the likeliest token below which it alone is kept."
    )


TruncationParams = PLessParams | TopHParams | TopNSigmaParams | GreedyBelowParams  # remove tokens, change no others
Params = EMInfParams | AdaptiveTemperatureParams | MeasureParams | TruncationParams

METHODS: dict[str, type[Params]] = {
    "em_inf": EMInfParams,
    "adaptive_temperature": AdaptiveTemperatureParams,
    "none": MeasureParams,
    "p_less": PLessParams,
    "top_h": TopHParams,
    "top_n_sigma": TopNSigmaParams,
    "greedy_below": GreedyBelowParams,
}
_BOOLEANS = {
    name for model in METHODS.values() for name, field in model.model_fields.items() if field.annotation is bool
}


def parse_params(value: object, default: Params | None = None) -> Params | None:
    """Return the params that `value` asks for, or None for "off".

    Args:
        value: None or true (the default), false (off), a mapping of settings, or params, which are returned unchanged.
        default: what None and true stand for; true without a default is EM-INF with its default settings.

    Raises:
        ParamsError: if `value` cannot be used; it names the field, the value received and what is allowed.
    """
    if value is None:
        return default
    if value is True:
        return default or EMInfParams()
    if value is False:
        return None
    if isinstance(value, Params):
        return value
    if not isinstance(value, Mapping):
        raise ParamsError(EXTRA_ARGS_KEY, f"got {shorten(value)}; must be an object, true or false")
    return _from_mapping(value)


def from_extra_args(extra_args: Mapping[str, Any] | None, default: Params | None = None) -> Params | None:
    """Return the params in vLLM's `SamplingParams.extra_args`: `em_inf` as an object, or flat `em_inf_<name>` keys.

    Raises:
        ParamsError: if a setting cannot be used, or both forms are given at once.
    """
    if not extra_args:
        return default
    flat = {key.removeprefix(FLAT_PREFIX): extra_args[key] for key in flat_keys(extra_args)}
    # vLLM's `vllm_xargs` turns JSON's true and false into 1 and 0.
    value = _as_bool(extra_args.get(EXTRA_ARGS_KEY))
    flat |= {name: _as_bool(flat[name]) for name in _BOOLEANS & flat.keys()}
    if not flat:
        return parse_params(value, default)
    if value not in (None, True):
        raise ParamsError(EXTRA_ARGS_KEY, f"give either `{EXTRA_ARGS_KEY}` or flat `{FLAT_PREFIX}...` keys, not both")
    try:
        return parse_params(flat)
    except ParamsError as error:
        raise ParamsError(error.field.replace(".", "_"), error.problem) from None


def _as_bool(value: object) -> object:
    """Return 0 and 1 as false and true, and anything else as it is."""
    return bool(value) if isinstance(value, int) and value in (0, 1) else value


def flat_keys(extra_args: Iterable[str]) -> list[str]:
    """Return the names of flat settings in `extra_args`, as many as are needed to find one that is unknown."""
    return list(islice((key for key in extra_args if key.startswith(FLAT_PREFIX)), MAX_FLAT_KEYS))


def as_written(error: ParamsError, extra_args: Mapping[str, Any]) -> ParamsError:
    """Return `error` with its field as `extra_args` has it: `em_inf_steps` in the flat form, else `em_inf.steps`."""
    flat = error.field.replace(".", "_")
    return ParamsError(flat, error.problem) if flat in extra_args else error


def with_step_limit(params: Params | None, max_steps: int) -> Params | None:
    """Return `params` within a server's limit on steps; a default above the limit is lowered to it.

    Raises:
        ParamsError: if the request itself asks for more steps.
    """
    if not isinstance(params, EMInfParams) or params.steps <= max_steps:
        return params
    if "steps" in params.model_fields_set:
        raise too_many_steps_error(params, max_steps)
    return params.model_copy(update={"steps": max_steps})


def too_many_steps_error(params: EMInfParams, max_steps: int) -> ParamsError:
    """Make the error for more steps than a server allows."""
    problem = f"got {params.steps}; this server allows an integer from 0 up to {max_steps}"
    return ParamsError(f"{EXTRA_ARGS_KEY}.steps", problem)


def _from_mapping(settings: Mapping[str, Any]) -> Params:
    """Return the params of the method that `settings` names (without a name: EM-INF)."""
    method = settings.get("method", "em_inf")
    model = METHODS.get(method) if isinstance(method, str) else None
    if model is None:
        allowed = ", ".join(METHODS)
        raise ParamsError(f"{EXTRA_ARGS_KEY}.method", f"got {shorten(method)}; must be one of {allowed}")
    return validate(model, settings, EXTRA_ARGS_KEY)
