"""One training run: the pieces put together, trained, kept, and written down. What a run leaves in its folder:

config.json, *.safetensors, ...   the kept weights (or the adapter) with the tokenizer: what em-serve serves
checkpoints/                      to go on from, optimizer state and all
run.json, run.md                  the card: settings, data, curves, why it ended (em_train/card.py)
"""

import json
import os
import re
import shutil
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from answers.extract import Answer
from em_train import card, data, outputs
from em_train.guards import Limits
from em_train.probe import Probe
from em_train.prompts import InputError, Prompt, read_prompts
from em_train.settings import FtSettings, RlSettings, Settings, TrainSettings

CHECKPOINTS = "checkpoints"
if not torch.cuda.is_available():  # where TRL could use vLLM, its warning about untried versions matters
    warnings.filterwarnings("ignore", "TRL currently supports vLLM")
LONE_READER = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")  # accelerate's, for its processes
STATE = "trainer_state.json"  # what a trainer writes last into a checkpoint

# torch.save tells of a full disk in these ways only.
UNWRITTEN = re.compile("PytorchStreamWriter|inline_container|iostream error")


def run(settings: TrainSettings) -> str:
    """Train, and write everything into `settings.out`; returns why it ended.

    Raises:
        InputError: something asked for cannot be done. Nothing has been changed then.
        OSError: the disk; what had been written before is whole.
    """
    _check_base_is_whole(settings)
    checkpoint = _place(settings)
    prompts, rows = data.read(settings)
    tokenizer, model = load(settings)
    trainer = _trainer(settings, model, tokenizer, prompts, rows)
    set_seed(settings.seed, device_specific=True)  # processes must not draw the same for different prompts
    written = card.Card(settings, prompts, rows, trainer)
    if trainer.is_world_process_zero():
        written.write(settings.out)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_model(str(settings.out))
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, SafetensorError) or UNWRITTEN.search(str(error)):
            raise OSError(f"a checkpoint could not be written to {settings.out}: {error}") from error
        raise
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(settings.out)
        written.write(settings.out, ended=True)
    trainer.accelerator.end_training()
    return written.ended


# ---- Where


def _place(settings: TrainSettings) -> Path | None:
    """The checkpoint to go on from, if any; broken ones are removed."""
    folder = settings.out / CHECKPOINTS
    there = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if there and not settings.resume:
        raise InputError(
            f"--out: {settings.out} holds a run already; --resume goes on with it, another folder begins anew"
        )
    if settings.resume:
        card.check_same(settings)
    while there and not _is_whole(there[-1]):
        print(f"em-train: {there[-1]} was not written to its end, and is left out", file=sys.stderr)
        shutil.rmtree(there.pop(), ignore_errors=True)
    settings.out.mkdir(parents=True, exist_ok=True)
    return there[-1] if there else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError):
        return False
    return True


# ---- The model


def load(settings: Settings) -> tuple[Any, Any]:
    """Tokenizer and model, in float32: steps of 1e-6 are lost in bfloat16 weights."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--model: got {settings.model!r}; no model that transformers loads: {reason}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model


def _check_fits(settings: TrainSettings, model: Any, longest: int) -> None:
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and longest + settings.max_tokens > room:
        raise InputError(
            f"--max-tokens: got {settings.max_tokens}; at most {room - longest}: the model has {room} positions, "
            f"and the longest prompt takes {longest}"
        )


def _check_base_is_whole(settings: TrainSettings) -> None:
    """accelerate can have one process alone read the weights and give the trained model to the others; nothing gives
    them the base model (TRL 1.16), and the KL would be to empty weights."""
    weight = settings.beta if isinstance(settings, RlSettings) else getattr(settings, "kl_weight", 0.0)
    lone = all(os.environ.get(name, "").lower() in ("true", "1") for name in LONE_READER)
    if weight and lone and not settings.lora_rank:
        flag = "--beta" if isinstance(settings, RlSettings) else "--kl-weight"
        raise InputError(
            f"{flag}: got {weight}; needs `fsdp_cpu_ram_efficient_loading: false` in accelerate's configuration, "
            "or --lora-rank: every process has to read the base model"
        )


def _base(settings: FtSettings, trainer: Trainer) -> Any:
    """The frozen model that the KL is measured to, spread as the trained one is."""
    from trl.models.utils import prepare_deepspeed, prepare_fsdp

    _, base = load(settings)
    base.requires_grad_(False)
    outputs.fuse(base)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(base, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(base, trainer.accelerator)
    return trainer.accelerator.prepare_model(base, evaluation_mode=True)


# ---- The trainer


def _trainer(
    settings: TrainSettings,
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    rows: data.Rows,
) -> Any:
    trainer: Any
    if isinstance(settings, RlSettings):
        trainer = _rl(settings, model, tokenizer, prompts)
    else:
        assert isinstance(settings, FtSettings)
        trainer = _ft(settings, model, tokenizer, prompts, rows)
    trainer.probe = _probe(settings, model, tokenizer, prompts)
    return trainer


def _ft(
    settings: FtSettings,
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    rows: data.Rows,
) -> Any:
    from trl.trainer.utils import disable_dropout_in_model

    from em_train.ft import EntropyTrainer

    dataset = data.ft_dataset(settings, tokenizer, prompts, rows)
    disable_dropout_in_model(model)
    outputs.fuse(model)
    if peft := _peft(settings):
        model = get_peft_model(model, peft)
    trainer = EntropyTrainer(
        settings,
        model=model,
        args=TrainingArguments(**_arguments(settings), train_sampling_strategy="sequential"),
        train_dataset=dataset,
        eval_dataset=dataset[:1],  # transformers wants one; `evaluate` asks the probe
        processing_class=tokenizer,
    )
    if settings.kl_weight and not peft:
        trainer.base = _base(settings, trainer)
    return trainer


def _rl(settings: RlSettings, model: Any, tokenizer: Any, prompts: list[Prompt]) -> Any:
    from trl.trainer.rloo_config import RLOOConfig

    from em_train.rl import ConfidenceTrainer

    dataset = data.rl_dataset(settings, tokenizer, prompts)
    arguments = RLOOConfig(
        **_arguments(settings),
        num_generations=settings.generations,
        beta=settings.beta,
        temperature=settings.temperature,
        max_completion_length=settings.max_tokens,
        shuffle_dataset=False,  # it is in a drawn order
        disable_dropout=True,
        use_vllm=_uses_vllm(settings),
        vllm_mode="colocate",
    )
    return ConfidenceTrainer(
        settings,
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=dataset.select([0]),  # as in _ft
        processing_class=tokenizer,
        peft_config=_peft(settings),
    )


def _arguments(settings: TrainSettings) -> dict[str, Any]:
    """Of transformers' TrainingArguments, and so of TRL's."""
    from accelerate import PartialState

    use_cpu = not torch.cuda.is_available()
    at_once = settings.micro_batch_size * PartialState(cpu=use_cpu).num_processes
    if settings.batch_size % at_once:
        raise InputError(
            f"--batch-size: got {settings.batch_size}; must be a multiple of {at_once}, "
            "--micro-batch-size times processes"
        )
    return {
        "output_dir": str(settings.out / CHECKPOINTS),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // at_once,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_cpu": use_cpu,
        "seed": settings.seed,
        "logging_steps": 1,
        "report_to": settings.report_to,
        "remove_unused_columns": False,
        "eval_strategy": "steps",
        "eval_steps": settings.eval_every,
        "eval_on_start": not any((settings.out / CHECKPOINTS).glob("checkpoint-*")),  # what came before has it
        "save_steps": settings.eval_every,
        "save_total_limit": 2,  # the best and the last
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_keep",
        "greater_is_better": True,
    }


def _peft(settings: TrainSettings) -> LoraConfig | None:
    if not settings.lora_rank:
        return None
    alpha = settings.lora_alpha or 2 * settings.lora_rank
    return LoraConfig(r=settings.lora_rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def _uses_vllm(settings: RlSettings) -> bool:
    possible = torch.cuda.is_available() and find_spec("vllm") is not None
    if settings.vllm == "on" and not possible:
        raise InputError("--vllm: got 'on'; it needs CUDA, and vLLM installed beside em-train")
    return possible and settings.vllm != "off"


def _probe(settings: TrainSettings, model: Any, tokenizer: Any, prompts: list[Prompt]) -> Probe:
    held_out = read_prompts(settings.held_out) if settings.held_out else []
    if any(prompt.answer is None for prompt in held_out):
        raise InputError(f"--held-out: {settings.held_out} has a row without `answer`")
    asked, scored = (
        [outputs.encode(tokenizer, prompt, settings.plain) for prompt in some] for some in (prompts, held_out)
    )
    _check_fits(settings, model, max(map(len, asked + scored)))
    return Probe(
        prompts=asked[: settings.eval_prompts],
        held_out=scored,
        answers=[prompt.answer or "" for prompt in held_out],
        answer=Answer(type=settings.answer),
        limits=Limits(**{name: getattr(settings, name) for name in Limits.__dataclass_fields__}),
        ends=outputs.end_tokens(model, tokenizer),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
    )
