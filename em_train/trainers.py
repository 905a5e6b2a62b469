"""Construction of a run's trainer: em-train's settings in the words of transformers' and TRL's arguments."""

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from peft import get_peft_model
from transformers import TrainingArguments

from em_train import data
from em_train.checkpoints import CHECKPOINTS_DIR, list_checkpoints
from em_train.evaluation import plan_evaluation
from em_train.model import add_fused_head, load_base, lora_config
from em_train.prompts import InputError, Prompt
from em_train.settings import FtSettings, RlSettings, TrainSettings

if not torch.cuda.is_available():  # with CUDA, TRL could use vLLM, and its warning about untested versions matters
    warnings.filterwarnings("ignore", "TRL currently supports vLLM")


def build_trainer(
    settings: TrainSettings,
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    rows: list[data.Sampled],
) -> Any:
    """Return the trainer that the settings ask for, with its dataset and its evaluation plan.

    Raises:
        InputError: if settings, data, model and machine do not fit together.
    """
    trainer: Any
    if isinstance(settings, RlSettings):
        trainer = _build_rl(settings, model, tokenizer, prompts)
    else:
        assert isinstance(settings, FtSettings)
        trainer = _build_ft(settings, model, tokenizer, prompts, rows)
    trainer.evaluation_plan = plan_evaluation(settings, model, tokenizer, prompts)
    return trainer


def _build_ft(
    settings: FtSettings,
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    rows: list[data.Sampled],
) -> Any:
    from trl.trainer.utils import disable_dropout_in_model

    from em_train.ft import EntropyTrainer

    dataset = data.ft_dataset(settings, tokenizer, model.get_input_embeddings().num_embeddings, prompts, rows)
    disable_dropout_in_model(model)
    add_fused_head(model)
    if lora := lora_config(settings):
        model = get_peft_model(model, lora)
    trainer = EntropyTrainer(
        settings,
        model=model,
        args=TrainingArguments(**training_arguments(settings), train_sampling_strategy="sequential"),
        train_dataset=dataset,
        eval_dataset=dataset[:1],  # transformers requires one; `evaluate` uses the evaluation plan instead
        processing_class=tokenizer,
    )
    if settings.kl_weight and not lora:
        trainer.base = load_base(settings, trainer)
    return trainer


def _build_rl(settings: RlSettings, model: Any, tokenizer: Any, prompts: list[Prompt]) -> Any:
    from trl.trainer.rloo_config import RLOOConfig

    from em_train.rl import ConfidenceTrainer

    dataset = data.rl_dataset(settings, tokenizer, prompts)
    arguments = RLOOConfig(
        **training_arguments(settings),
        num_generations=settings.generations,
        beta=settings.beta,
        temperature=settings.temperature,
        max_completion_length=settings.max_tokens,
        shuffle_dataset=False,  # the dataset is shuffled already
        disable_dropout=True,
        use_vllm=_use_vllm(settings),
        vllm_mode="colocate",
    )
    return ConfidenceTrainer(
        settings,
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=dataset.select([0]),  # as in _build_ft
        processing_class=tokenizer,
        peft_config=lora_config(settings),
    )


def check_reporter(settings: TrainSettings) -> None:
    """Check that what `report_to` names is installed.

    Raises:
        InputError: if it is not.
    """
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    name = settings.report_to
    if name != "none" and name not in get_available_reporting_integrations():  # type: ignore[no-untyped-call]
        raise InputError(f"--report-to: got {name!r}; it is not installed, or switched off: pip install {name}")


def training_arguments(settings: TrainSettings) -> dict[str, Any]:
    """Return the arguments of transformers' TrainingArguments, which TRL's RLOOConfig extends.

    Raises:
        InputError: if the processes cannot share a batch equally.
    """
    from accelerate import PartialState

    use_cpu = not torch.cuda.is_available()
    outputs_at_once = settings.micro_batch_size * PartialState(cpu=use_cpu).num_processes
    if settings.batch_size % outputs_at_once:
        raise InputError(
            f"--batch-size: got {settings.batch_size}; must be a multiple of {outputs_at_once}, "
            "--micro-batch-size times processes"
        )
    return {
        "output_dir": str(settings.out / CHECKPOINTS_DIR),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // outputs_at_once,
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
        "eval_on_start": not list_checkpoints(settings),  # a resumed run has this evaluation in its log
        "save_steps": settings.eval_every,
        "save_total_limit": 2,  # the best and the last
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_keep",
        "greater_is_better": True,
    }


def _use_vllm(settings: RlSettings) -> bool:
    possible = torch.cuda.is_available() and find_spec("vllm") is not None
    if settings.vllm == "on" and not possible:
        raise InputError("--vllm: got 'on'; it needs CUDA, and vLLM installed beside em-train")
    return possible and settings.vllm != "off"
