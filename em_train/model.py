"""Loading what is trained: tokenizer and model, TRL's fused head, the frozen base model of the KL.

Knows the settings, nothing of trainers' arguments or of a run's folder.
"""

import os
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from em_train.prompts import InputError
from em_train.settings import RlSettings, Settings, TrainSettings

# With both of these of accelerate set, one process alone reads the weights and sends them to the others.
SINGLE_READER_ENV = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")


def load(settings: Settings) -> tuple[Any, Any]:
    """Return the tokenizer and the model, in float32: steps of 1e-6 would be lost in bfloat16 weights.

    Raises:
        InputError: if transformers cannot load `settings.model`, or it cannot pad.
    """
    try:  # trust_remote_code: transformers would ask on a terminal
        tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # a folder with anything in it, a hub, a proxy, a package that a model needs: anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"--model: got {settings.model!r}; no model that transformers loads: {reason}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"--model: got {settings.model!r}; its tokenizer must have a padding token or an end token")
    return tokenizer, model


def add_fused_head(model: Any) -> None:
    """Give a model TRL's fused language-model head; call it before an adapter is added.

    `model(**batch, fused_lm_head=True)` then returns `entropy` and `log_probs`, each [rows, tokens - 1], in nats, both
    differentiable, 0 if the label is -100.
    """
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy"))


def load_base(settings: TrainSettings, trainer: Trainer) -> Any:
    """Return the frozen model that the KL is measured against, distributed like the trained one."""
    from trl.models.utils import prepare_deepspeed, prepare_fsdp

    _, base = load(settings)
    base.requires_grad_(False)
    add_fused_head(base)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(base, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(base, trainer.accelerator)
    return trainer.accelerator.prepare_model(base, evaluation_mode=True)


def lora_config(settings: TrainSettings) -> LoraConfig | None:
    """Return the adapter to train, on all linear layers; None if the full weights are trained."""
    if not settings.lora_rank:
        return None
    alpha = settings.lora_alpha or 2 * settings.lora_rank
    return LoraConfig(r=settings.lora_rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def check_context_length(settings: Settings, model: Any, longest_prompt: int) -> None:
    """Check that the longest prompt (tokens) and an output of `max_tokens` fit into the model's positions.

    Raises:
        InputError: if they do not.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest_prompt + settings.max_tokens > positions:
        raise InputError(
            f"--max-tokens: got {settings.max_tokens}; at most {positions - longest_prompt}: the model has {positions} "
            f"positions, and the longest prompt takes {longest_prompt}"
        )


def check_base_can_load(settings: TrainSettings) -> None:
    """Check that every process reads the base model, if there is a KL to it.

    accelerate can let one process read the weights and send the trained model to the others; nothing sends them the
    base model (TRL 1.16), and the KL would be to empty weights.

    Raises:
        InputError: if accelerate is configured in that way.
    """
    weight = settings.beta if isinstance(settings, RlSettings) else getattr(settings, "kl_weight", 0.0)
    single_reader = all(os.environ.get(name, "").lower() in ("true", "1") for name in SINGLE_READER_ENV)
    if weight and single_reader and not settings.lora_rank:
        flag = "--beta" if isinstance(settings, RlSettings) else "--kl-weight"
        raise InputError(
            f"{flag}: got {weight}; needs `fsdp_cpu_ram_efficient_loading: false` in accelerate's configuration, "
            "or --lora-rank: every process has to read the base model"
        )
