"""What a run trains on: prompts or a file of outputs, in the order in which the steps use them."""

import random
from typing import Any

from em_train import outputs
from em_train.prompts import InputError, Prompt, read_jsonl, read_prompts
from em_train.settings import FtSettings, RlSettings, TrainSettings

Rows = list[tuple[Prompt, dict[str, Any]]]  # of a file that `em-train sample` wrote


def read(settings: TrainSettings) -> tuple[list[Prompt], Rows]:
    """Return the prompts, and the rows of the file of outputs (none without --outputs).

    Raises:
        InputError: if a file cannot be read, is empty, or lacks a field that the training needs.
    """
    if isinstance(settings, FtSettings) and settings.outputs is not None:
        rows = [
            (_parse_sampled(row, f"{settings.outputs}: {place}"), row) for place, row in read_jsonl(settings.outputs)
        ]
        if not rows:
            raise InputError(f"--outputs: {settings.outputs} has no rows")
        return list({prompt.key: prompt for prompt, _ in rows}.values()), rows
    assert settings.prompts is not None
    prompts = read_prompts(settings.prompts, settings.prompt_column, settings.split, settings.limit)
    if isinstance(settings, RlSettings) and settings.reward == "correct" and any(p.answer is None for p in prompts):
        raise InputError("--reward: got 'correct'; a prompt has no `answer`")
    return prompts, []


def ft_dataset(settings: FtSettings, tokenizer: Any, prompts: list[Prompt], rows: Rows) -> list[dict[str, list[int]]]:
    """Return the rows of an `EntropyTrainer`, `batch_size` for each step."""
    chosen = [prompt for prompt, _ in rows] or prompts
    encoded = [{"prompt_ids": outputs.encode(tokenizer, prompt, settings.plain)} for prompt in chosen]
    for row, (_, sampled) in zip(encoded, rows, strict=False):
        row["output_ids"] = _output_ids(tokenizer, sampled)[: settings.max_tokens]
    return [encoded[i] for i in shuffled_order(len(chosen), settings.steps * settings.batch_size, settings.seed)]


def rl_dataset(settings: RlSettings, tokenizer: Any, prompts: list[Prompt]) -> Any:
    """Return a `datasets.Dataset` for TRL's trainers, which repeat each prompt `generations` times."""
    from datasets import Dataset

    order = shuffled_order(len(prompts), settings.steps * settings.batch_size // settings.generations, settings.seed)
    chosen = [prompts[i] for i in order]
    columns: dict[str, list[Any]] = {"prompt": [_for_trl(settings, tokenizer, prompt) for prompt in chosen]}
    if settings.reward == "correct":
        columns["answer"] = [prompt.answer for prompt in chosen]
    return Dataset.from_dict(columns)


def shuffled_order(count: int, needed: int, seed: int) -> list[int]:
    """Return `needed` indices below `count`: each once before any comes twice, every round shuffled anew."""
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < needed:
        order += rng.sample(range(count), count)
    return order[:needed]


def _parse_sampled(row: dict[str, Any], place: str) -> Prompt:
    if "prompt" not in row or not isinstance(row.get("output"), str):
        raise InputError(f"{place}: has no `prompt` and `output`; must be a file that `em-train sample` wrote")
    return Prompt(row["prompt"], row.get("answer"))


def _output_ids(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """Return the sampled tokens; without them in the file, the text's tokens and its end token if it ended."""
    if row.get("token_ids"):
        return list(row["token_ids"])
    ended = [tokenizer.eos_token_id] if row.get("finish_reason") == "stop" else []
    return list(tokenizer(row["output"], add_special_tokens=False)["input_ids"]) + ended


def _for_trl(settings: RlSettings, tokenizer: Any, prompt: Prompt) -> Any:
    """Return chat turns, to which TRL applies the chat template, or text, to which it does not."""
    no_chat_template = isinstance(prompt.content, str) and (settings.plain or not tokenizer.chat_template)
    return prompt.content if no_chat_template else prompt.messages
