"""A model's outputs in this process: generated, collated, and scored with each token's entropy and log-probability.

The logits of all tokens never exist at once: TRL's fused language-model head (em_train/model.py) works in chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from em_train.prompts import InputError, Prompt, shorten

IGNORED = -100  # the label of a token that is not part of an output
GENERATION_BATCH_SIZE = 64  # prompts decoded side by side


@dataclass(frozen=True)
class Output:
    """One scored output.

    Attributes:
        prompt_ids: the prompt's tokens.
        token_ids: the output's tokens, including the end token.
        entropies: of the model before each output token, nats.
        logprobs: of each output token, nats.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    entropies: list[float]
    logprobs: list[float]

    @property
    def entropy(self) -> float:
        """Mean over the output's tokens, nats."""
        return sum(self.entropies) / max(1, len(self.entropies))


# input_ids, attention_mask and labels, each [rows, tokens], padded on the right; labels are IGNORED outside outputs.
Batch = dict[str, torch.Tensor]


def encode(tokenizer: Any, prompt: Prompt, no_chat_template: bool = False) -> list[int]:
    """Return a prompt's token ids, up to where the output begins.

    Text is encoded as it is if `no_chat_template` is set or the tokenizer has no template.

    Raises:
        InputError: if there is no chat template for chat turns, it refuses them, or no token results.
    """
    if isinstance(prompt.content, str) and (no_chat_template or not tokenizer.chat_template):
        ids = list(tokenizer(prompt.content)["input_ids"])
    elif not tokenizer.chat_template:
        raise InputError("--model: its tokenizer has no chat template, and a prompt is chat turns; must be text")
    else:
        ids = _apply_chat_template(tokenizer, prompt)
    if not ids:
        raise InputError(f"a prompt has no tokens: got {shorten(prompt.content)}")
    return ids


def _apply_chat_template(tokenizer: Any, prompt: Prompt) -> list[int]:
    try:
        encoded = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # a template is a program, and may fail in any way
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"--model: its chat template refuses {shorten(prompt.messages)}: {reason}") from None
    return list(encoded["input_ids"])


def find_eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an output: the tokenizer's and those in the model's generation config.

    Raises:
        InputError: if the generation config has something else than numbers there.
    """
    declared = model.generation_config.eos_token_id
    listed = declared if isinstance(declared, list) else [] if declared is None else [declared]
    if any(type(each) is not int for each in listed):
        raise InputError(f"--model: eos_token_id: got {shorten(declared)}; must be a number or a list of numbers")
    return sorted({*listed, tokenizer.eos_token_id} - {None})


def collate(pairs: Sequence[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """Return (prompt, output) pairs of token ids as one batch of `len(pairs)` rows."""
    longest = max(len(prompt) + len(output) for prompt, output in pairs)
    shape = (len(pairs), longest)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    for row, (prompt, output) in enumerate(pairs):
        end = len(prompt) + len(output)
        batch["input_ids"][row, :end] = torch.tensor(prompt + output)
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, len(prompt) : end] = torch.tensor(output)
    return batch


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[list[int]],
    pad_id: int,
    eos_ids: Sequence[int],
    max_tokens: int,
    temperature: float,
    batch_size: int = GENERATION_BATCH_SIZE,
) -> list[list[int]]:
    """Return one output for each prompt, sampled with torch's global random state; temperature 0 is greedy.

    Args:
        model: anything with `device` and the `generate` of transformers.
        prompts: token ids.
        pad_id: the padding token.
        eos_ids: the tokens that end an output.
        max_tokens: the longest output.
        temperature: of the softmax.
        batch_size: prompts decoded side by side.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths: little padding
    found: dict[int, list[int]] = {}
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}  # transformers would truncate by default
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[pad_id] * (longest - len(prompts[i])) + prompts[i] for i in chosen])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
        tokens = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_tokens,
            pad_token_id=pad_id,
            eos_token_id=list(eos_ids),
            **sampling,
        )
        found.update(zip(chosen, (_until_end(row, eos_ids) for row in tokens[:, longest:].tolist()), strict=True))
    return [found[i] for i in range(len(prompts))]


def _until_end(tokens: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Return the tokens up to and including the first end token."""
    first = next((i for i, token in enumerate(tokens) if token in eos_ids), len(tokens) - 1)
    return tokens[: first + 1]


@torch.no_grad()
def score(model: Any, pairs: Sequence[tuple[list[int], list[int]]], pad_id: int, batch_size: int) -> list[Output]:
    """Return the entropies and log-probabilities of (prompt, output) pairs; `model` must have the fused head."""
    found = []
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        batch = {name: tensor.to(model.device) for name, tensor in collate(chunk, pad_id).items()}
        scored = model(**batch, fused_lm_head=True)
        is_output = (batch["labels"][:, 1:] != IGNORED).cpu()
        entropies, logprobs = scored.entropy.float().cpu(), scored.log_probs.float().cpu()
        for row, (prompt, output) in enumerate(chunk):
            values = (tensor[row][is_output[row]].tolist() for tensor in (entropies, logprobs))
            found.append(Output(prompt, output, *values))
    return found
