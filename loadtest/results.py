"""The schema of results.json. Rates are per second, latencies in seconds, entropies in nats.

Fields that were renamed keep their first names in files, as aliases, so that old results stay readable.
"""

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

SCHEMA_VERSION = 1
MAX_FIGURE = 1e30  # beyond it a figure is none, and sums and ratios of figures overflow


class Part(BaseModel):
    """A part of the results; code may build it by field names or by the names in files."""

    model_config = ConfigDict(populate_by_name=True)

    @field_validator("*")
    @classmethod
    def _within_bounds(cls, value: Any) -> Any:
        """Refuse numbers that nothing measures; NaN and infinity stand for what could not be computed."""
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int | float) and MAX_FIGURE < abs(one) < math.inf:
                raise ValueError(f"must be a number from {-MAX_FIGURE:g} to {MAX_FIGURE:g}")
        return value


class Interval(Part):
    """An estimate and its range; each use says which range: a 95 % interval, or that of the repetitions."""

    value: float
    low: float
    high: float


class Percentiles(Part):
    """The distribution of one quantity over requests."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


class Latency(Part):
    """Latencies of complete requests; None if nothing was streamed. `e2e` is per question, with all its votes."""

    ttft: Percentiles | None
    tpot: Percentiles | None  # (E2E - TTFT) / (delivered tokens - 1)
    itl: Percentiles | None  # between two chunks
    e2e: Percentiles | None


class StageResult(Part):
    """One config under one load, one repetition."""

    config: str = Field(validation_alias="arm", serialization_alias="arm")
    load: str
    target_load: float = Field(validation_alias="offered", serialization_alias="offered")
    open_loop: bool
    repetition: int
    seconds: float
    questions: int = Field(validation_alias="items", serialization_alias="items")
    ok: int
    incomplete: int
    failed: int
    errors: dict[str, int]  # requests, by kind of error
    problems: dict[str, int] = {}  # replies that are not correct, by the kind of reason that the checker gives
    requests_per_second: float  # complete HTTP requests
    output_tokens_per_second: float  # every generated token, by `usage`
    delivered_tokens_per_second: float  # tokens of the replies that users get (in a client's vote: of one voter)
    answers_per_second: float  # questions with status ok
    correct_per_second: float | None
    goodput: float | None  # questions per second within the SLO; None without an SLO
    prompt_tokens: int
    output_tokens: int
    counted_output_tokens: int | None
    latency: Latency
    scheduling_delay_p99: float = Field(validation_alias="lag_p99", serialization_alias="lag_p99")
    accuracy: float | None  # over all questions asked: a failed one is not correct
    tokens_per_question: float | None = None  # output tokens per question asked, of all branches; None without usage
    cut_off: float | None = None  # share of complete replies, all voters' too, that ended at their longest length
    entropy_before: float | None  # mean per token
    entropy_after: float | None
    optimized_share: float | None  # of tokens
    parts: int = 1  # above 1: the run was broken off in this stage, and resumed
    invalid: list[str]  # why its figures must not be used; empty for most stages
    warnings: list[str]  # such as a server whose usage differs from its counter


class ConfigResult(Part):
    """One config under one load, over all valid repetitions. Rates: median over repetitions, with the range."""

    config: str = Field(validation_alias="arm", serialization_alias="arm")
    load: str
    target_load: float = Field(validation_alias="offered", serialization_alias="offered")
    repetitions: int
    answers_per_second: Interval
    correct_per_second: Interval | None
    requests_per_second: Interval
    output_tokens_per_second: Interval
    delivered_tokens_per_second: Interval
    goodput: Interval | None
    accuracy: Interval | None  # 95 %, bootstrap over questions
    tokens_per_question: float | None = None  # as in stages, over all repetitions; so is cut_off
    cut_off: float | None = None
    tokens_per_correct: float | None  # output tokens
    seconds_per_correct: float | None  # of the server's time: 1 / correct_per_second
    cost_per_million_tokens: float | None  # output tokens; None without a price
    cost_per_correct: float | None
    ttft_p50: float | None
    ttft_p99: float | None
    tpot_p50: float | None
    e2e_p50: float | None
    e2e_p99: float | None
    entropy_before: float | None
    entropy_after: float | None
    optimized_share: float | None
    entropies: list[float]  # each reply's mean entropy before, for a histogram; at most 2,000


class Comparison(Part):
    """One config against a reference, under one load."""

    config: str = Field(validation_alias="arm", serialization_alias="arm")
    reference: str
    load: str
    answers_per_second_ratio: Interval  # over repetitions, paired: median and range
    tokens_ratio: float | None  # output tokens per question; None without usage
    accuracy_difference: Interval | None  # 95 %, paired bootstrap over questions


class Run(Part):
    """When, where and with which software the run was made."""

    started: str  # ISO 8601, UTC
    seconds: float  # of the last sitting, if it was resumed
    base_url: str
    model: str
    machine: dict[str, str]
    versions: dict[str, str]  # of this tool and its libraries
    git_commit: str | None
    server: dict[str, Any]  # what `/version`, `/v1/models` and `/v1/em_inf` return, and the flags the user states


class Results(Part):
    """The content of results.json."""

    schema_version: int = SCHEMA_VERSION
    name: str
    run: Run
    scenario: dict[str, Any]  # as the scenario file has it: its configs are under `arms`
    calibration: dict[str, dict[str, bool | float]]  # by config: a `Calibration`, and whether it is within tolerance
    stages: list[StageResult]
    configs: list[ConfigResult] = Field(validation_alias="arms", serialization_alias="arms")
    comparisons: list[Comparison]
    failed: list[str]  # why the exit status is not 0; empty otherwise
