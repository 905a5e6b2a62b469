"""What a run trains on: prompts or a file of outputs, in the order in which the steps use them."""

import random
from dataclasses import dataclass
from typing import Any

from em_train import outputs
from em_train.fingerprint import fingerprint_of
from em_train.prompts import InputError, Prompt, parse_prompt, read_jsonl, read_prompts, shorten
from em_train.settings import FtSettings, RlSettings, TrainSettings


@dataclass(frozen=True)
class Sampled:
    """A row of a file that `em-train sample` wrote.

    Attributes:
        prompt: what was asked.
        output: the answer's text.
        token_ids: the answer's tokens; empty if the file has none.
        tokenizer: the fingerprint of the tokenizer of `token_ids`; None in older files.
        is_ended: whether the model ended the answer itself.
        place: file and line, for errors.
    """

    prompt: Prompt
    output: str
    token_ids: list[int]
    tokenizer: str | None
    is_ended: bool
    place: str


def read(settings: TrainSettings) -> tuple[list[Prompt], list[Sampled]]:
    """Return the prompts, and the rows of the file of outputs (none without --outputs).

    Raises:
        InputError: if a file cannot be read, is empty, or lacks a field that the training needs.
    """
    if isinstance(settings, FtSettings) and settings.outputs is not None:
        rows = [_parse_sampled(row, f"{settings.outputs}: {place}") for place, row in read_jsonl(settings.outputs)]
        if not rows:
            raise InputError(f"--outputs: {settings.outputs} has no rows")
        return list({row.prompt.key: row.prompt for row in rows}.values()), rows
    assert settings.prompts is not None
    prompts = read_prompts(settings.prompts, settings.prompt_column, settings.split, settings.limit)
    if isinstance(settings, RlSettings) and settings.reward == "correct" and any(p.answer is None for p in prompts):
        raise InputError("--reward: got 'correct'; a prompt has no `answer`")
    return prompts, []


def ft_dataset(
    settings: FtSettings, tokenizer: Any, vocabulary_size: int, prompts: list[Prompt], rows: list[Sampled]
) -> list[dict[str, list[int]]]:
    """Return the rows of an `EntropyTrainer`, `batch_size` for each step.

    Raises:
        InputError: if the token ids of a row are not of this tokenizer, or if a row has nothing to train on.
    """
    chosen = [row.prompt for row in rows] or prompts
    encoded = [{"prompt_ids": outputs.encode(tokenizer, prompt, settings.plain)} for prompt in chosen]
    own = fingerprint_of(tokenizer)
    for ids, row in zip(encoded, rows, strict=False):
        if row.token_ids and row.tokenizer not in (None, own):
            problem = f"token_ids: are of the tokenizer {row.tokenizer}; --model has {own}"
            raise InputError(f"{row.place}: {problem}: sample with this model, or remove `token_ids` from the file")
        ids["output_ids"] = _output_ids(tokenizer, row)[: settings.max_tokens]
        if beyond := [i for i in ids["output_ids"] if not 0 <= i < vocabulary_size]:
            raise InputError(f"{row.place}: token_ids: got {beyond[0]}; must be from 0 to {vocabulary_size - 1}")
        if not ids["output_ids"]:
            raise InputError(f"{row.place}: output: got {row.output!r}; must have a token to train on")
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


def _parse_sampled(row: dict[str, Any], place: str) -> Sampled:
    if "prompt" not in row or not isinstance(row.get("output"), str):
        raise InputError(f"{place}: has no `prompt` and `output`; must be a file that `em-train sample` wrote")
    ids, tokenizer = row.get("token_ids") or [], row.get("tokenizer")
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise InputError(f"{place}: token_ids: got {shorten(ids)}; must be a list of whole numbers")
    if not isinstance(tokenizer, str | None):
        raise InputError(f"{place}: tokenizer: got {shorten(tokenizer)}; must be text")
    prompt = parse_prompt(row, "prompt", place)
    return Sampled(prompt, row["output"], ids, tokenizer, row.get("finish_reason") == "stop", place)


def _output_ids(tokenizer: Any, row: Sampled) -> list[int]:
    """Return the sampled tokens; without them in the file, the text's tokens and its end token if it ended."""
    if row.token_ids:
        return row.token_ids
    ended = [tokenizer.eos_token_id] if row.is_ended and tokenizer.eos_token_id is not None else []
    return list(tokenizer(row.output, add_special_tokens=False)["input_ids"]) + ended


def _for_trl(settings: RlSettings, tokenizer: Any, prompt: Prompt) -> Any:
    """Return chat turns, to which TRL applies the chat template, or text, to which it does not."""
    no_chat_template = isinstance(prompt.content, str) and (settings.plain or not tokenizer.chat_template)
    return prompt.content if no_chat_template else prompt.messages
