"""What a run trains on: prompts, or a file of outputs, in the order in which the steps take them."""

import random
from typing import Any

from em_train import outputs
from em_train.prompts import InputError, Prompt, read_jsonl, read_prompts
from em_train.settings import FtSettings, RlSettings, TrainSettings

Rows = list[tuple[Prompt, dict[str, Any]]]  # of a file of outputs, which `em-train sample` wrote


def read(settings: TrainSettings) -> tuple[list[Prompt], Rows]:
    """The prompts, and where there is a file of outputs its rows.

    Raises:
        InputError: a file cannot be read, is empty, or lacks what the training needs.
    """
    if isinstance(settings, FtSettings) and settings.outputs is not None:
        rows = [(_sampled(row, f"{settings.outputs}: {where}"), row) for where, row in read_jsonl(settings.outputs)]
        if not rows:
            raise InputError(f"--outputs: {settings.outputs} has no rows")
        return list({prompt.key: prompt for prompt, _ in rows}.values()), rows
    assert settings.prompts is not None
    prompts = read_prompts(settings.prompts, settings.prompt_column, settings.split, settings.limit)
    if isinstance(settings, RlSettings) and settings.reward == "correct" and any(p.answer is None for p in prompts):
        raise InputError("--reward: got 'correct'; a prompt has no `answer`")
    return prompts, []


def ft_dataset(settings: FtSettings, tokenizer: Any, prompts: list[Prompt], rows: Rows) -> list[dict[str, list[int]]]:
    """Rows of an `EntropyTrainer`, `batch_size` for each step."""
    asked = [prompt for prompt, _ in rows] or prompts
    encoded = [{"prompt_ids": outputs.encode(tokenizer, prompt, settings.plain)} for prompt in asked]
    for row, (_, sampled) in zip(encoded, rows, strict=False):
        row["output_ids"] = _output_ids(tokenizer, sampled)[: settings.max_tokens]
    return [encoded[i] for i in drawn_order(len(asked), settings.steps * settings.batch_size, settings.seed)]


def rl_dataset(settings: RlSettings, tokenizer: Any, prompts: list[Prompt]) -> Any:
    """A `datasets.Dataset` for TRL's trainers, each prompt once for all its `generations`."""
    from datasets import Dataset

    order = drawn_order(len(prompts), settings.steps * settings.batch_size // settings.generations, settings.seed)
    asked = [prompts[i] for i in order]
    columns: dict[str, list[Any]] = {"prompt": [_as_trl(settings, tokenizer, p) for p in asked]}
    if settings.reward == "correct":
        columns["answer"] = [p.answer for p in asked]
    return Dataset.from_dict(columns)


def drawn_order(count: int, needed: int, seed: int) -> list[int]:
    """`needed` indices below `count`: every one once before any comes twice, each round shuffled anew."""
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < needed:
        order += rng.sample(range(count), count)
    return order[:needed]


def _sampled(row: dict[str, Any], where: str) -> Prompt:
    if "prompt" not in row or not isinstance(row.get("output"), str):
        raise InputError(f"{where}: has no `prompt` and `output`; must be a file that `em-train sample` wrote")
    return Prompt(row["prompt"], row.get("answer"))


def _output_ids(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """As they were sampled; of a file without them, the text's tokens and the end that it had."""
    if row.get("token_ids"):
        return list(row["token_ids"])
    ended = [tokenizer.eos_token_id] if row.get("finish_reason") == "stop" else []
    return list(tokenizer(row["output"], add_special_tokens=False)["input_ids"]) + ended


def _as_trl(settings: RlSettings, tokenizer: Any, prompt: Prompt) -> Any:
    """Chat turns, to which TRL applies the template, or bare text."""
    bare = isinstance(prompt.content, str) and (settings.plain or not tokenizer.chat_template)
    return prompt.content if bare else prompt.messages
