"""The settings of `em-train`: one frozen class for each command, with defaults and their source.

Every field is a flag: `learning_rate` is `--learning-rate`. Entropies are in nats.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from em_train.prompts import InputError

AnySettings = TypeVar("AnySettings", bound="Settings")
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """The settings that all commands share."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model: str = Field(description="Name or folder of the model.")
    out: Path = Field(description="Folder (of sample: file) for the result.")
    prompts: str | None = Field(
        default=None,
        description="JSONL file with a `prompt` (text or chat turns) on each line, or a dataset's name or folder.",
    )
    prompt_column: str = Field(default="prompt", description="The field that holds the prompt.")
    split: str = Field(default="train", description="Split of the dataset.")
    limit: Count | None = Field(default=None, description="The most distinct prompts to use.")
    plain: bool = Field(default=False, description="Do not apply the chat template to text prompts.")
    max_tokens: Count = Field(default=4096, description="Longest output, tokens; published: 4,096.")
    temperature: float = Field(default=1.0, gt=0, le=10, description="Sampling temperature of the outputs.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of everything random.")


class SampleSettings(Settings):
    """Sample the model's own outputs to each prompt, without labels, with their mean token entropy."""

    base_url: str | None = Field(
        default=None,
        description="OpenAI-compatible server, such as http://127.0.0.1:8000/v1; default: generate in this process.",
    )
    api_key: str | None = Field(default=None, description="Default: $OPENAI_API_KEY.")
    samples: Count = Field(default=1, description="Outputs for each prompt; published for EM-FT: 1.")
    concurrency: Count = Field(default=64, description="Requests in flight, or prompts decoded side by side.")

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        if self.prompts is None:
            raise ValueError("--prompts is missing")
        return self


class TrainSettings(Settings):
    """The settings that both forms of training share."""

    steps: Count = Field(default=40, description="Optimizer steps; published: at most 40.")
    batch_size: Count = Field(
        default=512, description="Outputs in an optimizer step, over all processes; published: 512."
    )
    micro_batch_size: Count = Field(
        default=4, description="Outputs in one pass on one device; gradients are accumulated."
    )
    learning_rate: float = Field(
        default=1e-6,
        gt=0,
        le=1,
        description="Constant rate of AdamW; published for full weights: 1e-6; LoRA needs more.",
    )
    lora_rank: int = Field(
        default=0, ge=0, le=512, description="0: train the full weights; above: train a LoRA adapter of this rank."
    )
    lora_alpha: Count | None = Field(default=None, description="Default: twice the rank.")
    bf16: bool = Field(default=False, description="Compute in bfloat16; weights and AdamW's state stay in float32.")
    gradient_checkpointing: bool = Field(default=False, description="Save memory at the cost of time.")
    resume: bool = Field(default=False, description="Continue from the last complete checkpoint in --out.")
    report_to: Literal["none", "tensorboard", "wandb"] = Field(
        default="none", description="Where to log curves as well."
    )

    eval_every: Count = Field(default=5, description="Steps between evaluations; each is a checkpoint too.")
    eval_prompts: Count = Field(default=32, description="Training prompts answered in each evaluation.")
    held_out: str | None = Field(
        default=None,
        description="JSONL file with `prompt` and `answer`; the score on it selects the checkpoint to keep.",
    )
    answer: Literal["boxed", "last_number", "text"] = Field(
        default="boxed", description="Where a reply has its answer."
    )
    entropy_floor: float = Field(default=0.01, ge=0, description="Stop if the mean token entropy is below this.")
    shortest: float = Field(
        default=0.5, ge=0, le=1, description="Stop if the mean length is below this share of the untrained model's."
    )
    longest: float = Field(
        default=2.0, ge=1, description="Stop if the mean length is above this multiple of the untrained model's."
    )
    repetition_rise: float = Field(
        default=0.2, gt=0, le=1, description="Stop if the share of repeated 8-grams has risen by more than this."
    )
    score_drop: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="Stop if the held-out score is below its best by more than this and two standard errors.",
    )

    @model_validator(mode="after")
    def _check_divisors(self) -> Self:
        for name, value, divisor in (
            ("--steps", self.steps, "eval_every"),
            ("--batch-size", self.batch_size, "micro_batch_size"),
        ):
            if value % getattr(self, divisor):
                problem = f"must be a multiple of {_flag(divisor)}, which is {getattr(self, divisor)}"
                raise ValueError(f"{name}: got {value}; {problem}")
        return self


class FtSettings(TrainSettings):
    """EM-FT: minimise the mean token entropy H(pi(.|y<t)) of the model's own outputs."""

    outputs: Path | None = Field(default=None, description="Train on this file, which `em-train sample` wrote.")
    fresh_every: int = Field(
        default=0, ge=0, description="Without --outputs: sample outputs from the model every this many steps."
    )
    kl_weight: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Weight of KL(model || base) in the loss, estimated on the outputs' tokens (k3).",
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.outputs is None) == (self.fresh_every == 0):
            raise ValueError("give either --outputs (a file to train on) or --fresh-every (on-policy), not both")
        if self.outputs is None and self.prompts is None:
            raise ValueError("--prompts is missing: --fresh-every samples from them")
        if self.fresh_every and self.eval_every % self.fresh_every:
            raise ValueError(
                f"--eval-every: got {self.eval_every}; must be a multiple of --fresh-every, which is "
                f"{self.fresh_every}: checkpoints hold no outputs"
            )
        return self


class RlSettings(TrainSettings):
    """EM-RL: train by RLOO with the model's own confidence as the only reward."""

    reward: Literal["token", "sequence", "correct"] = Field(
        default="token",
        description="token: minus the entropies of an output's tokens. sequence: the log-probabilities of its tokens. "
        "correct: 1 for the right `answer` (the labelled reference).",
    )
    reduce: Literal["sum", "mean"] = Field(
        default="sum", description="How to combine an output's tokens; the paper's text sums, its code takes the mean."
    )
    generations: int = Field(default=4, ge=2, le=1024, description="Outputs for each prompt (N); published: 4.")
    beta: float = Field(
        default=0.001, ge=0, le=1000, description="Weight of KL(model || base) in the reward; published: 0.001."
    )
    vllm: Literal["auto", "on", "off"] = Field(
        default="auto", description="Generate with vLLM in this process; auto: if CUDA and vLLM are present."
    )

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.prompts is None:
            raise ValueError("--prompts is missing")
        if self.batch_size % self.generations:
            raise ValueError(
                f"--batch-size: got {self.batch_size}; must be a multiple of --generations, which is {self.generations}"
            )
        return self


COMMANDS: dict[str, type[Settings]] = {"sample": SampleSettings, "ft": FtSettings, "rl": RlSettings}


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings that a command line asks for; default: of this process.

    Raises:
        InputError: if a value cannot be used; the text names flag, value and range.
    """
    parser = argparse.ArgumentParser(prog="em-train", description="Train a model on its own unlabeled outputs.")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for name, model in COMMANDS.items():
        about = (model.__doc__ or "").split("\n")[0]
        command = commands.add_parser(name, help=about, description=about, argument_default=argparse.SUPPRESS)
        for field, info in model.model_fields.items():
            default = "" if info.is_required() or info.default in (None, False) else f" (default: {info.default})"
            text = (info.description or "").replace("%", "%%") + default
            value = {"action": "store_true"} if info.annotation is bool else {"metavar": field.upper()}
            command.add_argument(_flag(field), required=info.is_required(), help=text, **value)
    given = vars(parser.parse_args(arguments))
    return validate(COMMANDS[given.pop("command")], given)


def validate(model: type[AnySettings], given: dict[str, object]) -> AnySettings:
    """Return `given` as settings.

    Raises:
        InputError: as `parse` does.
    """
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise InputError("; ".join(_explain(each) for each in error.errors())) from None


def _explain(error: ErrorDetails) -> str:
    text = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # a rule over several fields, which names its flags itself
        return text
    return f"{_flag(str(error['loc'][0]))}: got {error['input']!r}; {text[0].lower() + text[1:]}"


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
