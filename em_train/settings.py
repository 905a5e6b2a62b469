"""What `em-train` can be asked for: one frozen class a command, validated, with defaults and where they come from.

Every field is a flag: `learning_rate` is `--learning-rate`. Entropies are in nats.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from em_train.prompts import InputError

AnySettings = TypeVar("AnySettings", bound="Settings")
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """What all commands share."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model: str = Field(description="Name or folder of the model.")
    out: Path = Field(description="Where the result is written.")
    prompts: str | None = Field(
        default=None,
        description="JSONL file with a `prompt` (text or chat turns) a line, or a dataset's name or folder.",
    )
    prompt_column: str = Field(default="prompt", description="The field that holds the prompt.")
    split: str = Field(default="train", description="Of a dataset.")
    limit: Count | None = Field(default=None, description="At most so many distinct prompts.")
    plain: bool = Field(default=False, description="Prompts are bare text: no chat template.")
    max_tokens: Count = Field(default=4096, description="Of an output; 4,096 is the published length.")
    temperature: float = Field(default=1.0, gt=0, le=10, description="At which outputs are sampled.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of everything drawn at random.")


class SampleSettings(Settings):
    """Unlabeled outputs: what the model itself says to each prompt, with the entropies of its tokens."""

    base_url: str | None = Field(
        default=None,
        description="OpenAI-compatible server, such as http://127.0.0.1:8000/v1; without: in this process.",
    )
    api_key: str | None = Field(default=None, description="Default: $OPENAI_API_KEY.")
    samples: Count = Field(default=1, description="Outputs a prompt; 1 is the published number for EM-FT.")
    concurrency: Count = Field(default=64, description="Requests in flight, or rows decoded side by side.")

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        if self.prompts is None:
            raise ValueError("--prompts is missing")
        return self


class TrainSettings(Settings):
    """What both forms of training share."""

    steps: Count = Field(default=40, description="Optimizer steps; the published runs take at most 40.")
    batch_size: Count = Field(default=512, description="Outputs an optimizer step, over all processes; published: 512.")
    micro_batch_size: Count = Field(default=4, description="Outputs at a time on one device; the rest is accumulated.")
    learning_rate: float = Field(
        default=1e-6, gt=0, le=1, description="Of AdamW, constant; 1e-6 is published for full weights, LoRA needs more."
    )
    lora_rank: int = Field(default=0, ge=0, le=512, description="0: full weights. Above: a LoRA adapter of this rank.")
    lora_alpha: Count | None = Field(default=None, description="Default: twice the rank.")
    bf16: bool = Field(default=False, description="Compute in bfloat16; weights and Adam's state stay in float32.")
    gradient_checkpointing: bool = Field(default=False, description="Less memory, more time.")
    resume: bool = Field(default=False, description="Go on from the last whole checkpoint in --out.")
    report_to: Literal["none", "tensorboard", "wandb"] = Field(default="none", description="Where curves go as well.")

    eval_every: Count = Field(default=5, description="Steps between checks of the guards, which are checkpoints too.")
    eval_prompts: Count = Field(default=32, description="Prompts that are answered at each check.")
    held_out: str | None = Field(
        default=None,
        description="JSONL file with `prompt` and `answer`: the score that chooses the checkpoint to keep.",
    )
    answer: Literal["boxed", "last_number", "text"] = Field(default="boxed", description="Where a reply's answer is.")
    entropy_floor: float = Field(default=0.01, ge=0, description="Stop below this mean token entropy.")
    shortest: float = Field(default=0.5, ge=0, le=1, description="Stop below this share of the first mean length.")
    longest: float = Field(default=2.0, ge=1, description="Stop above this multiple of the first mean length.")
    repetition_rise: float = Field(
        default=0.2, gt=0, le=1, description="Stop when the share of repeated 8-grams has risen by this much."
    )
    score_drop: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="Stop when the held-out score is this far (and two standard errors) below its best.",
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for name, value, divisor in (
            ("--steps", self.steps, "eval_every"),
            ("--batch-size", self.batch_size, "micro_batch_size"),
        ):
            if value % getattr(self, divisor):
                flag = "--" + divisor.replace("_", "-")
                raise ValueError(
                    f"{name}: got {value}; must be a multiple of {flag}, which is {getattr(self, divisor)}"
                )
        return self


class FtSettings(TrainSettings):
    """EM-FT: minimise the mean token entropy H(pi(.|y<t)) of the model's own outputs, one output a prompt."""

    outputs: Path | None = Field(default=None, description="File that `em-train sample` wrote: train on it.")
    fresh_every: int = Field(default=0, ge=0, description="Without --outputs: sample anew every so many steps.")
    kl_weight: float = Field(
        default=0.0, ge=0, le=1000, description="Weight of KL(model || base), estimated on the outputs' tokens (k3)."
    )

    @model_validator(mode="after")
    def _has_outputs(self) -> Self:
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
    """EM-RL: RLOO with the model's own confidence as the only reward."""

    reward: Literal["token", "sequence", "correct"] = Field(
        default="token",
        description="token: minus the entropies of an output's tokens. sequence: the log-probabilities of its tokens. "
        "correct: 1 for the right `answer`, the labelled reference.",
    )
    reduce: Literal["sum", "mean"] = Field(
        default="sum", description="Over an output's tokens; the paper sums, its code means."
    )
    generations: int = Field(default=4, ge=2, le=1024, description="Outputs a prompt (N); published: 4.")
    beta: float = Field(
        default=0.001, ge=0, le=1000, description="Weight of KL(model || base) in the reward; published."
    )
    vllm: Literal["auto", "on", "off"] = Field(
        default="auto", description="Rollouts by vLLM in this process; auto: where there is CUDA and vLLM."
    )

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.prompts is None:
            raise ValueError("--prompts is missing")
        if self.batch_size % self.generations:
            raise ValueError(
                f"--batch-size: got {self.batch_size}; must be a multiple of --generations, which is {self.generations}"
            )
        return self


COMMANDS: dict[str, type[Settings]] = {"sample": SampleSettings, "ft": FtSettings, "rl": RlSettings}


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from a command line.

    Raises:
        InputError: a value that cannot be; the text names flag, value and range.
    """
    parser = argparse.ArgumentParser(prog="em-train", description="Train a model on its own unlabeled outputs.")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for name, kind in COMMANDS.items():
        about = (kind.__doc__ or "").split("\n")[0]
        command = commands.add_parser(name, help=about, description=about, argument_default=argparse.SUPPRESS)
        for field, info in kind.model_fields.items():
            default = "" if info.is_required() or info.default in (None, False) else f" (default: {info.default})"
            about = (info.description or "").replace("%", "%%") + default
            how = {"action": "store_true"} if info.annotation is bool else {"metavar": field.upper()}
            command.add_argument("--" + field.replace("_", "-"), required=info.is_required(), help=about, **how)
    given = vars(parser.parse_args(arguments))
    return checked(COMMANDS[given.pop("command")], given)


def checked(kind: type[AnySettings], given: dict[str, object]) -> AnySettings:
    """Validated settings; raises InputError as `parse` does."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise InputError("; ".join(_told(each) for each in error.errors())) from None


def _told(error: object) -> str:
    assert isinstance(error, dict)
    text = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return str(text)
    flag = "--" + str(error["loc"][0]).replace("_", "-")
    return f"{flag}: got {error['input']!r}; {text[0].lower() + text[1:]}"
