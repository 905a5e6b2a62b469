"""The schema of a scenario file: a task, configs and loads. Knows nothing of how they are run.

The configs are written under the key `arms`, as in results.json: files keep that name.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from answers.extract import Answer

SEED_STRIDE = 1000  # between the seeds of two questions: a strategy's branches use the seeds in between


class ScenarioError(Exception):
    """A scenario that cannot be run. The message names the field, its value and what is allowed."""


class Part(BaseModel):
    """A part of a scenario: immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# ---- Tasks: what is asked


class DemoTask(Part):
    """The demo model's held-out problems."""

    type: Literal["demo"]
    count: int = Field(default=200, ge=1)
    seed: int = 17


Checker = Literal["exact", "number", "boxed", "python"]


class FileTask(Part):
    """Questions and answers from a JSONL file."""

    type: Literal["file"]
    path: Path
    question: str = Field(default="question", description="Name of the field with the question.")
    answer: str = Field(default="answer", description="Name of the field with the answer or the unit tests.")
    checker: Checker = "exact"
    answer_pattern: str | None = Field(
        default=None,
        description="Regular expression for the answer inside the answer field: its first group, or its match.",
    )
    prompt: str = Field(default="{question}", description="The user message; {question} is replaced.")
    count: int | None = Field(default=None, ge=1, description="Use only the first questions; default: all.")


class PresetTask(Part):
    """A known benchmark, from a file that the user provides."""

    type: Literal["math500", "aime", "amc", "gsm8k", "scicode"]
    path: Path
    count: int | None = Field(default=None, ge=1)


class Lengths(Part):
    """A distribution of lengths in tokens: normal (constant without a spread), uniform or lognormal."""

    mean: int = Field(ge=1)
    spread: float = Field(default=0.0, ge=0, description="Standard deviation, in tokens.")
    shape: Literal["normal", "uniform", "lognormal"] = "normal"
    least: int = Field(default=1, ge=1)
    most: int = Field(default=1_000_000, ge=1)


class SyntheticTask(Part):
    """Prompts and replies of random lengths without answers, to measure throughput alone."""

    type: Literal["synthetic"]
    prompt_tokens: Lengths
    output_tokens: Lengths
    count: int = Field(default=200, ge=1)
    seed: int = 17
    word: str = Field(default=" the", description="Repeated to fill the prompt; should be one token.")


Task = Annotated[DemoTask | FileTask | PresetTask | SyntheticTask, Field(discriminator="type")]


# ---- Configs: how replies are decoded


class ClientVote(Part):
    """Self-consistency by the client: n requests with different seeds, and the most frequent answer."""

    n: int = Field(ge=2, le=1024)
    answer: Answer | None = Field(
        default=None, description="How to find the answer; default: as the task's checker does."
    )


class Config(Part):
    """A decoding configuration: fields that override those of every request."""

    name: str = Field(min_length=1, max_length=60)
    body: dict[str, Any] = Field(default={}, description="Fields of the request; null removes one.")
    vote: ClientVote | None = None
    match_entropy_of: str | None = Field(
        default=None, description="Name of a config; the temperature with the same mean entropy is found and used."
    )


# ---- Loads: when questions are asked


class Closed(Part):
    """A fixed number of questions in flight: the next is asked when one is answered."""

    type: Literal["closed"]
    concurrency: int = Field(ge=1, le=100_000)

    @property
    def label(self) -> str:
        """The load's name in results."""
        return f"closed {self.concurrency}"


class Open(Part):
    """Questions are asked at a fixed mean rate, whether or not earlier ones are answered."""

    type: Literal["poisson", "constant"]
    rate: float = Field(gt=0, description="Questions per second.")

    @property
    def label(self) -> str:
        """The load's name in results."""
        return f"{self.type} {self.rate:g}/s"


class Sweep(Part):
    """Closed loops, each with `factor` times the concurrency of the last, until answers/s grow by less than `gain`."""

    type: Literal["sweep"]
    start: int = Field(default=1, ge=1)
    factor: float = Field(default=2.0, gt=1)
    most: int = Field(default=1024, ge=1)
    gain: float = Field(default=0.05, ge=0)

    def levels(self) -> Iterator[Closed]:
        """Yield the closed loops, by rising concurrency."""
        level = float(self.start)
        while round(level) <= self.most:
            yield Closed(type="closed", concurrency=round(level))
            level = max(level * self.factor, round(level) + 1)


Load = Annotated[Closed | Open | Sweep, Field(discriminator="type")]


class Slo(Part):
    """The service-level objective, in milliseconds; goodput counts the questions that meet it."""

    ttft_ms: float | None = Field(default=None, gt=0)
    tpot_ms: float | None = Field(default=None, gt=0)
    e2e_ms: float | None = Field(default=None, gt=0)


class Limits(Part):
    """Limits beyond which a stage is invalid, a request is given up or the run has failed."""

    error_rate: float = Field(
        default=0.01, ge=0, le=1, description="Share of questions not answered; above it the run has failed."
    )
    lag_ms: float = Field(
        default=50.0, gt=0, description="The generator's p99 scheduling delay; above it a stage is invalid."
    )
    stall_s: float = Field(default=60.0, gt=0, description="A request is given up after this time without a byte.")
    request_s: float = Field(default=600.0, gt=0, description="A request is given up after this time.")


class Scenario(Part):
    """The content of a scenario file: one comparison."""

    name: str
    model: str | None = Field(default=None, description="Default: the first model that the server lists.")
    task: Task
    system: str | None = Field(default=None, description="A system message before every question.")
    request: dict[str, Any] = Field(default={}, description="Fields of every request.")
    configs: tuple[Config, ...] = Field(min_length=1, validation_alias="arms", serialization_alias="arms")
    references: tuple[str, ...] = Field(
        default=(), description="Configs that all are compared with; default: the first."
    )
    loads: tuple[Load, ...] = Field(min_length=1)
    repetitions: int = Field(default=3, ge=1)
    warmup: int = Field(default=8, ge=0, description="Questions asked before each stage and not measured.")
    seed: int = 0
    stream: bool = True
    slo: Slo = Slo()
    limits: Limits = Limits()
    price_per_hour: float | None = Field(default=None, gt=0, description="Price of the machine that serves.")

    @field_validator("configs", mode="before")
    @classmethod
    def _listed(cls, configs: object) -> object:
        """Turn a mapping from names to configs into a list of configs."""
        if not isinstance(configs, dict):
            return configs
        return [{"name": name, **(config or {})} for name, config in configs.items()]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [config.name for config in self.configs]
        if len(set(names)) < len(names):
            raise ValueError(f"arms: names must differ; got {', '.join(names)}")
        for name in self.references:
            if name not in names:
                raise ValueError(f"references: got {name!r}; must be one of {', '.join(names)}")
        for config in self.configs:
            other = config.match_entropy_of
            if other is not None and (other not in names or other == config.name):
                raise ValueError(f"arms.{config.name}.match_entropy_of: got {other!r}; must be another name in arms")
            if (config.body.get("n") or 1) > 1:
                raise ValueError(f"arms.{config.name}.body.n: one reply per request; use `vote` or `strategy`")
        return self

    @property
    def compared_with(self) -> tuple[str, ...]:
        """The names of the configs that all others are compared with."""
        return self.references or (self.configs[0].name,)

    def seeds(self, repetition: int, question: int) -> Iterator[int]:
        """Yield the seeds for one question's requests: the same for all configs, different for all else."""
        return itertools.count(self.seed + (repetition * 1_000_003 + question) * SEED_STRIDE)


def load(path: Path) -> Scenario:
    """Read a scenario from a YAML file.

    Raises:
        ScenarioError: if the file cannot be read or a field is wrong; names the field.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ScenarioError(f"{path}: {error}") from None
    try:
        return Scenario.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        got = "" if first["type"] in ("value_error", "missing") else f"got {first['input']!r}; "
        raise ScenarioError(f"{path}: {field}: {got}{first['msg']}") from None
