"""The schema of results.json. Rates are per second, latencies in seconds, entropies in nats."""

from typing import Any

from pydantic import BaseModel

SCHEMA_VERSION = 1


class Interval(BaseModel):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


class Percentiles(BaseModel):
    """Of one quantity over requests."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


class Latency(BaseModel):
    """Of the calls that were whole; None where nothing was streamed. e2e is of the whole question, votes included."""

    ttft: Percentiles | None
    tpot: Percentiles | None  # (E2E - TTFT) / (delivered tokens - 1)
    itl: Percentiles | None  # between two chunks
    e2e: Percentiles | None


class StageResult(BaseModel):
    """One arm under one load, one repetition."""

    arm: str
    load: str
    offered: float
    open_loop: bool
    repetition: int
    seconds: float
    items: int
    ok: int
    incomplete: int
    failed: int
    errors: dict[str, int]  # by kind, calls
    requests_per_second: float  # HTTP requests that were whole
    output_tokens_per_second: float  # all that was generated, by `usage`
    delivered_tokens_per_second: float  # of replies that reached the user (for a client's vote: one of the voters')
    answers_per_second: float  # questions answered (status ok)
    correct_per_second: float | None
    goodput: float | None  # questions per second that kept to the SLO; None without one
    prompt_tokens: int
    output_tokens: int
    counted_output_tokens: int | None
    latency: Latency
    lag_p99: float
    accuracy: float | None  # of all that were asked: one that failed is not right
    entropy_before: float | None  # mean per token
    entropy_after: float | None
    optimized_share: float | None  # of tokens
    invalid: list[str]  # why its figures should not be used; empty for most
    warnings: list[str]  # such as a server whose usage is not what its counter says


class ArmResult(BaseModel):
    """One arm under one load, all valid repetitions together. Rates: median over repetitions, with the range."""

    arm: str
    load: str
    offered: float
    repetitions: int
    answers_per_second: Interval
    correct_per_second: Interval | None
    requests_per_second: Interval
    output_tokens_per_second: Interval
    delivered_tokens_per_second: Interval
    goodput: Interval | None
    accuracy: Interval | None  # bootstrap over questions
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
    entropies: list[float]  # mean entropy before of each reply, for a histogram; at most 2,000


class Comparison(BaseModel):
    """One arm against a reference, under one load."""

    arm: str
    reference: str
    load: str
    answers_per_second_ratio: Interval  # of the repetitions, paired: median and range
    tokens_ratio: float | None  # output tokens per question; None without usage
    accuracy_difference: Interval | None  # paired bootstrap over questions


class Run(BaseModel):
    """Where, when and with what."""

    started: str  # ISO 8601, UTC
    seconds: float
    base_url: str
    model: str
    machine: dict[str, str]
    versions: dict[str, str]  # of this tool, its libraries, and of the server where it says them
    git_commit: str | None
    server: dict[str, Any]  # what the server says of itself (`/version`, `/v1/models`, `/v1/em_inf`), or flags given


class Results(BaseModel):
    """results.json."""

    schema_version: int = SCHEMA_VERSION
    name: str
    run: Run
    scenario: dict[str, Any]
    calibration: dict[str, dict[str, float]]  # by arm: temperature found, its mean entropy, the target's
    stages: list[StageResult]
    arms: list[ArmResult]
    comparisons: list[Comparison]
    failed: list[str]  # why the exit status is not 0; empty otherwise
