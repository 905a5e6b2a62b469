"""The schema of a scenario file: a task, configs and loads. Knows nothing of how they are run.

The configs are written under the key `arms`, as in results.json: files keep that name.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from answers.extract import Answer
from loadtest.inputs import read_text, shortened
from loadtest.scenario_file import MAX_BYTES, parse_yaml

SEED_STRIDE = 1000  # between the seeds of two questions: voters, and a strategy's branches, use those in between
MAX_SEED = 2**31 - 1  # servers exist that read seeds as 32 bits with a sign
MAX_NAME_BYTES = 200  # file systems allow 255
MAX_CONCURRENCY = 100_000
MAX_TOKENS = 10_000_000
MAX_SECONDS = 1e7
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class ScenarioError(ValueError):
    """A scenario that cannot be run. The message names the field, its value and what is allowed."""


class Part(BaseModel):
    """A part of a scenario: immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# ---- Tasks: what is asked


class DemoTask(Part):
    """The demo model's held-out problems."""

    type: Literal["demo"]
    count: Count = 200
    seed: Seed = 17


Checker = Literal["exact", "number", "boxed", "python"]
Unsafe = Annotated[bool, Field(description="Let root run the code of replies even without namespaces.")]


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
    unsafe: Unsafe = False


class PresetTask(Part):
    """A known benchmark, from a file that the user provides."""

    type: Literal["math500", "minerva", "aime", "amc", "gsm8k", "humaneval", "mbpp", "scicode"]
    path: Path
    count: int | None = Field(default=None, ge=1)
    unsafe: Unsafe = False


class Lengths(Part):
    """A distribution of lengths in tokens: normal (constant without a spread), uniform or lognormal."""

    mean: int = Field(ge=1, le=MAX_TOKENS)
    spread: float = Field(default=0.0, ge=0, le=MAX_TOKENS, description="Standard deviation, in tokens.")
    shape: Literal["normal", "uniform", "lognormal"] = "normal"
    least: int = Field(default=1, ge=1, le=MAX_TOKENS)
    most: int = Field(default=1_000_000, ge=1, le=MAX_TOKENS)


class SyntheticTask(Part):
    """Prompts and replies of random lengths without answers, to measure throughput alone."""

    type: Literal["synthetic"]
    prompt_tokens: Lengths
    output_tokens: Lengths
    count: Count = 200
    seed: Seed = 17
    word: str = Field(default=" the", max_length=100, description="Repeated to fill the prompt; should be one token.")


Task = Annotated[DemoTask | FileTask | PresetTask | SyntheticTask, Field(discriminator="type")]


# ---- Configs: how replies are decoded


class ClientVote(Part):
    """Self-consistency by the client: n requests with different seeds, and the most frequent answer."""

    n: int = Field(ge=2, le=SEED_STRIDE)
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
    concurrency: int = Field(ge=1, le=MAX_CONCURRENCY)

    @property
    def label(self) -> str:
        """The load's name in results."""
        return f"closed {self.concurrency}"


class Open(Part):
    """Questions are asked at a fixed mean rate, whether or not earlier ones are answered."""

    type: Literal["poisson", "constant"]
    rate: float = Field(ge=1e-6, le=1e6, description="Questions per second.")

    @property
    def label(self) -> str:
        """The load's name in results."""
        return f"{self.type} {self.rate:g}/s"


class Sweep(Part):
    """Closed loops, each with `factor` times the concurrency of the last, until answers/s grow by less than `gain`."""

    type: Literal["sweep"]
    start: int = Field(default=1, ge=1, le=MAX_CONCURRENCY)
    factor: float = Field(default=2.0, gt=1, le=MAX_CONCURRENCY)
    most: int = Field(default=1024, ge=1, le=MAX_CONCURRENCY)
    gain: float = Field(default=0.05, ge=0)

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.start > self.most:
            raise ValueError(f"start: got {self.start}; must not be above most, {self.most}")
        return self

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
    stall_s: float = Field(
        default=60.0, gt=0, le=MAX_SECONDS, description="A request is given up after this time without a byte."
    )
    request_s: float = Field(default=600.0, gt=0, le=MAX_SECONDS, description="A request is given up after this time.")


def _file_name(name: str) -> str:
    """Check that a name is the name of a file, which cannot lead out of its folder."""
    if name in (".", "..") or {"/", "\\"} & set(name) or not name.isprintable():
        raise ValueError(f"got {shortened(name)}; must be the name of a folder: no slashes or control characters")
    if not 1 <= len(name.encode()) <= MAX_NAME_BYTES:
        raise ValueError(f"got {len(name.encode())} bytes; must be from 1 to {MAX_NAME_BYTES}")
    return name


class Scenario(Part):
    """The content of a scenario file: one comparison."""

    name: Annotated[str, AfterValidator(_file_name)] = Field(description="Also of the folder for the results.")
    model: str | None = Field(default=None, description="Default: the first model that the server lists.")
    task: Task
    system: str | None = Field(default=None, description="A system message before every question.")
    request: dict[str, Any] = Field(default={}, description="Fields of every request.")
    configs: tuple[Config, ...] = Field(
        min_length=1, max_length=1000, validation_alias="arms", serialization_alias="arms"
    )
    references: tuple[str, ...] = Field(
        default=(), description="Configs that all are compared with; default: the first."
    )
    loads: tuple[Load, ...] = Field(min_length=1)
    repetitions: int = Field(default=3, ge=1, le=10_000)
    warmup: int = Field(default=8, ge=0, le=1_000_000, description="Questions asked before each stage, not measured.")
    seed: Seed = 0
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
        for name, config in configs.items():
            if not isinstance(config, dict | None):
                raise ValueError(f"{name}: got {shortened(config)}; must be a mapping, or nothing")
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
            _check_request(config.body, f"arms.{config.name}.body")
        _check_request(self.request, "request")
        return self

    @property
    def compared_with(self) -> tuple[str, ...]:
        """The names of the configs that all others are compared with."""
        return self.references or (self.configs[0].name,)

    def sends_no_seed(self, config: Config) -> bool:
        """Return whether the requests of a config have no seed: it is null in its fields or in `request`."""
        return "seed" in self.request | config.body

    def seeds(self, repetition: int, question: int, questions: int) -> Iterator[int]:
        """Yield the seeds for one question's requests: the same for all configs, different for all else.

        `repetition` is that of the warm-up if it is one above the last; `questions` is how many the task has.
        """
        return itertools.count(self.seed + (repetition * questions + question) * SEED_STRIDE)

    def check_seeds(self, questions: int) -> None:
        """Raise a ScenarioError if the seeds of so many questions do not fit."""
        highest = self.seed + (self.repetitions + 1) * questions * SEED_STRIDE - 1
        if highest > MAX_SEED and not all(map(self.sends_no_seed, self.configs)):
            raise ScenarioError(
                f"seed: got {self.seed}; with {questions:,} questions, {self.repetitions} repetitions and the warm-up "
                f"the highest seed is {highest:,}; must be at most {MAX_SEED:,}, or null in `request` for none"
            )


def _check_request(fields: dict[str, Any], place: str) -> None:
    """Raise for fields by which a server sends several replies, and for a seed that would not be sent."""
    for name in ("n", "best_of"):
        value = fields.get(name, 1)
        if value is not None and (isinstance(value, bool) or value != 1):
            raise ValueError(f"{place}.{name}: got {shortened(value)}; one reply per request: use `vote` or `strategy`")
    if fields.get("seed") is not None:
        problem = "must be null, for none: each question has a seed of its own, see `seed` of the scenario"
        raise ValueError(f"{place}.seed: got {shortened(fields['seed'])}; {problem}")
    if "extra_body" in fields:
        raise ValueError(f"{place}.extra_body: belongs to OpenAI's clients; write its fields beside the others")


def load(path: Path) -> Scenario:
    """Read a scenario from a YAML file.

    Raises:
        ScenarioError: if the file cannot be read or a field is wrong; names the field.
    """
    try:
        return Scenario.model_validate(parse_yaml(read_text(path, MAX_BYTES)))
    except ValidationError as error:
        raise ScenarioError(f"{path}: {first_problem(error)}") from None
    except ValueError as error:
        raise ScenarioError(f"{path}: {error}") from None


def first_problem(error: ValidationError) -> str:
    """Return the first error of a validation in one line: the field, its value and what is allowed."""
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":  # of our own validators, which say what they got
        problem = str(first["ctx"]["error"])
    else:
        got = "" if first["type"] == "missing" else f"got {shortened(first['input'])}; "
        problem = got + first["msg"]
    return f"{field}: {problem}" if field else problem
