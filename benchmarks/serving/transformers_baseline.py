"""The released method as it is published: transformers' `generate`, one prompt at a time, EM-INF on every token.

It uses the model folder that the servers use; on the CPU with as many threads as the servers' model has.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.released_method import ReleasedProcessor
from em_sampler.params import EMInfParams
from harness.launch import THREADS


def released_rates(folder: Path, prompts: Sequence[list[int]], tokens: int, dummy: bool) -> Iterator[float]:
    """Yield output tokens per second of each prompt, after a first run that warms up.

    Args:
        folder: model folder.
        prompts: token ids.
        tokens: output tokens of each prompt.
        dummy: the folder has no weights; use random ones.
    """
    torch.set_num_threads(THREADS)
    model = _load_model(folder, dummy)
    _generate(model, prompts[0], tokens)
    for prompt in prompts:
        start = time.perf_counter()
        _generate(model, prompt, tokens)
        yield tokens / (time.perf_counter() - start)


def _load_model(folder: Path, dummy: bool) -> Any:
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = AutoConfig.from_pretrained(folder)
        if dummy:
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()  # type: ignore[no-untyped-call]
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=config.dtype)
    model.generation_config.eos_token_id = None  # as ignore_eos; min_new_tokens would forbid the token instead
    return model


def _generate(model: Any, prompt: list[int], tokens: int) -> None:
    inputs = torch.tensor([prompt], device=model.device)
    outputs = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        logits_processor=[ReleasedProcessor(EMInfParams())],
    )
    if outputs.shape[1] != len(prompt) + tokens:
        raise RuntimeError(f"{outputs.shape[1] - len(prompt)} tokens, not {tokens}")
