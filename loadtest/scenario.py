"""What a scenario file may say: a task, arms and loads. Knows nothing of how they are run."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from answers.extract import Answer

SEED_STRIDE = 1000  # between the seeds of two questions: a strategy's branches have the next ones


class ScenarioError(Exception):
    """A scenario that cannot be run. Its message names the field, the value and what is allowed."""


class Part(BaseModel):
    """A part of a scenario: read once, never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# ---- Tasks: what is asked


class DemoTask(Part):
    """The demo model's problems, of a split that it was not trained on."""

    type: Literal["demo"]
    count: int = Field(default=200, ge=1)
    seed: int = 17


Checker = Literal["exact", "number", "boxed", "python"]


class FileTask(Part):
    """Questions and answers from a JSONL file."""

    type: Literal["file"]
    path: Path
    question: str = Field(default="question", description="The field with the question.")
    answer: str = Field(default="answer", description="The field with the answer, or with the unit tests.")
    checker: Checker = "exact"
    answer_pattern: str | None = Field(default=None, description="The part of the answer field that is the answer.")
    prompt: str = Field(default="{question}", description="What the model is asked.")
    count: int | None = Field(default=None, ge=1, description="The first so many; default: all.")


class ReadyTask(Part):
    """A known benchmark, whose file the user has."""

    type: Literal["math500", "aime", "amc", "gsm8k", "scicode"]
    path: Path
    count: int | None = Field(default=None, ge=1)


class Lengths(Part):
    """A distribution of lengths in tokens: constant, uniform, or lognormal."""

    mean: int = Field(ge=1)
    spread: float = Field(default=0.0, ge=0, description="Standard deviation, in tokens.")
    shape: Literal["normal", "uniform", "lognormal"] = "normal"
    least: int = Field(default=1, ge=1)
    most: int = Field(default=1_000_000, ge=1)


class SyntheticTask(Part):
    """No answers: prompts and replies of drawn lengths, for throughput alone."""

    type: Literal["synthetic"]
    prompt_tokens: Lengths
    output_tokens: Lengths
    count: int = Field(default=200, ge=1)
    seed: int = 17
    word: str = Field(default=" the", description="Repeated for the prompt's length; should be one token.")


Task = Annotated[DemoTask | FileTask | ReadyTask | SyntheticTask, Field(discriminator="type")]


# ---- Arms: how it is decoded


class ClientVote(Part):
    """Self-consistency by the client: n requests with seeds of their own, the answer of most."""

    n: int = Field(ge=2, le=1024)
    answer: Answer | None = Field(default=None, description="How it is found; default: as the task's checker does.")


class Arm(Part):
    """A way to decode: fields laid over every request."""

    name: str = Field(min_length=1, max_length=60)
    body: dict[str, Any] = Field(default={}, description="Fields of the request; null removes one.")
    vote: ClientVote | None = None
    match_entropy_of: str | None = Field(
        default=None, description="An arm; the temperature is found whose mean entropy equals that arm's."
    )


# ---- Loads: how much of it at a time


class Closed(Part):
    """So many questions at a time, the next as one is answered."""

    type: Literal["closed"]
    concurrency: int = Field(ge=1, le=100_000)

    @property
    def label(self) -> str:
        """Its name in results."""
        return f"closed {self.concurrency}"


class Open(Part):
    """Questions arrive by the clock, whether others are answered or not."""

    type: Literal["poisson", "constant"]
    rate: float = Field(gt=0, description="Questions per second.")

    @property
    def label(self) -> str:
        """Its name in results."""
        return f"{self.type} {self.rate:g}/s"


class Sweep(Part):
    """Closed loops, each `factor` times the one before, until answers per second grow by less than `gain`."""

    type: Literal["sweep"]
    start: int = Field(default=1, ge=1)
    factor: float = Field(default=2.0, gt=1)
    most: int = Field(default=1024, ge=1)
    gain: float = Field(default=0.05, ge=0)

    def levels(self) -> Iterator[Closed]:
        """Its closed loops."""
        level = float(self.start)
        while round(level) <= self.most:
            yield Closed(type="closed", concurrency=round(level))
            level = max(level * self.factor, round(level) + 1)


Load = Annotated[Closed | Open | Sweep, Field(discriminator="type")]


class Slo(Part):
    """What a good request keeps to, in milliseconds; goodput counts those."""

    ttft_ms: float | None = Field(default=None, gt=0)
    tpot_ms: float | None = Field(default=None, gt=0)
    e2e_ms: float | None = Field(default=None, gt=0)


class Limits(Part):
    """Beyond these, a stage is invalid or the run has failed."""

    error_rate: float = Field(default=0.01, ge=0, le=1, description="Share of questions not answered.")
    lag_ms: float = Field(default=50.0, gt=0, description="The generator's own p99 delay.")
    stall_s: float = Field(default=60.0, gt=0, description="Seconds without a byte after which a request is given up.")
    request_s: float = Field(default=600.0, gt=0, description="Seconds for one request.")


class Scenario(Part):
    """One comparison."""

    name: str
    model: str | None = Field(default=None, description="Default: the first that the server lists.")
    task: Task
    system: str | None = Field(default=None, description="A system message before every question.")
    request: dict[str, Any] = Field(default={}, description="Fields that every arm's requests have.")
    arms: tuple[Arm, ...] = Field(min_length=1)
    references: tuple[str, ...] = Field(default=(), description="Arms all are compared with; default: the first.")
    loads: tuple[Load, ...] = Field(min_length=1)
    repetitions: int = Field(default=3, ge=1)
    warmup: int = Field(default=8, ge=0, description="Questions before each stage that are not counted.")
    seed: int = 0
    stream: bool = True
    slo: Slo = Slo()
    limits: Limits = Limits()
    price_per_hour: float | None = Field(default=None, gt=0, description="Of the machine that serves.")

    @field_validator("arms", mode="before")
    @classmethod
    def _named(cls, arms: object) -> object:
        """Arms may be written as a mapping from their names."""
        return [{"name": name, **(arm or {})} for name, arm in arms.items()] if isinstance(arms, dict) else arms

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"arms: names must differ; got {', '.join(names)}")
        for name in self.references:
            if name not in names:
                raise ValueError(f"references: got {name!r}; arms are {', '.join(names)}")
        for arm in self.arms:
            other = arm.match_entropy_of
            if other is not None and (other not in names or other == arm.name):
                raise ValueError(f"arms.{arm.name}.match_entropy_of: got {other!r}; must be another arm")
            if (arm.body.get("n") or 1) > 1:
                raise ValueError(f"arms.{arm.name}.body.n: one reply per request; use `vote` or `strategy`")
        return self

    @property
    def compared_with(self) -> tuple[str, ...]:
        """The names of the arms that all are compared with."""
        return self.references or (self.arms[0].name,)

    def seeds(self, repetition: int, item: int) -> Iterator[int]:
        """Of one question's requests: no two questions or repetitions share one, all arms do."""
        return itertools.count(self.seed + (repetition * 1_000_003 + item) * SEED_STRIDE)


def load(path: Path) -> Scenario:
    """The scenario in a YAML file.

    Raises:
        ScenarioError: naming the field.
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
