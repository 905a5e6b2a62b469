"""The configs of the serving benchmark, the models that it serves, and the requests that it sends."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from benchmarks import real_models
from benchmarks.serving import dummy_model
from demo.problems import problems
from demo.tokenizer import VOCABULARY, turn


@dataclass(frozen=True)
class ServedModel:
    """How a model is served; `target` is the least ratio of "on" to "off"."""

    concurrency: tuple[int, ...]
    target: float
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    """A way to serve and to decode; `base` names the config that it is compared with."""

    em_inf: dict[str, Any] | None
    base: str | None
    plain: bool = False  # served by vLLM without the plugin


MODELS = {
    "demo": ServedModel((1, 16, 64), 0.95),
    # A request with a seed crashes vLLM 0.32 on the CPU if prompts are prefilled in chunks (docs/findings/upstream.md).
    "vocab151k": ServedModel((1, 16, 64), 0.95, ("--enforce-eager", "--no-enable-chunked-prefill")),
    "0.5b": ServedModel((1, 16, 64), 0.95, ("--enforce-eager", "--no-enable-chunked-prefill")),
    "7b": ServedModel((64,), 0.98, ("--gpu-memory-utilization", "0.4")),  # two servers share the device
}
# In one type: on a CPU, em-serve and plain vLLM may choose different ones.
REAL_FLAGS = ("--enforce-eager", "--no-enable-chunked-prefill", "--max-model-len", "1024", "--dtype", "float32")
MODELS |= {name: ServedModel((1, 16, 64), 0.95, REAL_FLAGS) for name in real_models.MODELS}
DUMMY_FLAGS = ("--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "1024")

REAL_QUESTION = "Write a Python function that solves a puzzle with {} numbers, and explain it."

PLAIN, OFF, ON = "plain vLLM", "off", "on"
CONFIGS = {
    PLAIN: Config(None, None, plain=True),
    OFF: Config(None, PLAIN),
    ON: Config({"threshold": 0.3}, OFF),
    "all optimised": Config({"threshold": 0.0}, OFF),
    "below threshold": Config({"threshold": 20.0}, OFF),  # measured, and not changed
}


def prompts_of(model: str, count: int) -> list[list[int]]:
    """Return token ids: chats for the demo model and real ones, random ids for a model of random weights."""
    if model == "demo":
        questions = [problem.question for problem in problems("held_out", count, seed=0)]
        return [[*turn("user", question), VOCABULARY["<|assistant|>"]] for question in questions]
    if model in real_models.MODELS:
        tokenizer: Any = AutoTokenizer.from_pretrained(real_models.fetch(model))
        chats = [[{"role": "user", "content": REAL_QUESTION.format(number)}] for number in range(1, count + 1)]
        return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    rng = random.Random(0)
    return [rng.choices(range(1, dummy_model.SIZES[model]["vocab_size"]), k=32) for _ in range(count)]


def request_bodies(
    model: str, config: Config, prompts: Sequence[list[int]], tokens: int, number: int
) -> list[dict[str, Any]]:
    """Return the requests of one config in round `number`, each for a reply of `tokens` tokens.

    Every round has the same prompts, so that a prefix cache serves all configs alike, and other seeds.
    """
    common: dict[str, Any] = {"model": model, "max_tokens": tokens, "ignore_eos": True, "temperature": 1}
    if config.em_inf is not None:
        common["em_inf"] = {**config.em_inf, "stats": "summary" if number < 0 else "none"}
    first = (number + 1) * len(prompts)
    return [{**common, "prompt": prompt, "seed": first + index} for index, prompt in enumerate(prompts)]
