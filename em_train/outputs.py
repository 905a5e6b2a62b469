"""Outputs of a model in this process: drawn, and scored with each token's entropy and log-probability.

The vocabulary is never held for all tokens at once: TRL's fused language-model head goes over it in chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from em_train.prompts import Prompt

IGNORED = -100  # the label of a token that is no output
ROWS = 64  # prompts decoded side by side


@dataclass(frozen=True)
class Output:
    """One answer to one prompt.

    Attributes:
        prompt_ids, token_ids: the prompt's tokens and the output's, an end token included.
        entropies: of the model before each output token, nats.
        logprobs: of each output token.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    entropies: list[float]
    logprobs: list[float]

    @property
    def entropy(self) -> float:
        """Mean over the tokens, nats."""
        return sum(self.entropies) / max(1, len(self.entropies))


# input_ids, attention_mask and labels [rows, tokens], padded on the right; labels are -100 but for an output's tokens.
Batch = dict[str, torch.Tensor]


def encode(tokenizer: Any, prompt: Prompt, plain: bool = False) -> list[int]:
    """Token ids of a prompt, up to where the output begins; text stays bare if `plain` or without a chat template."""
    if isinstance(prompt.content, str) and (plain or not tokenizer.chat_template):
        return list(tokenizer(prompt.content)["input_ids"])
    encoded = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an output: the tokenizer's, and those that the model's generation settings name."""
    declared = model.generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else declared or []
    return sorted({*declared, tokenizer.eos_token_id} - {None})


def collate(pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> Batch:
    """Prompts with their outputs as a batch of `len(pairs)` rows."""
    longest = max(len(prompt) + len(output) for prompt, output in pairs)
    shape = (len(pairs), longest)
    batch = {
        "input_ids": torch.full(shape, pad),
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
def draw(
    model: Any,
    prompts: Sequence[list[int]],
    pad: int,
    ends: Sequence[int],
    max_tokens: int,
    temperature: float,
    rows: int,
) -> list[list[int]]:
    """One output for each prompt, by torch's global random state; temperature 0 is greedy.

    Args:
        rows: prompts decoded side by side.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # so that few rows wait for the longest
    found: dict[int, list[int]] = {}
    how: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        how |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}  # transformers would cut the distribution
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        longest = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in chosen])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
        tokens = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_tokens,
            pad_token_id=pad,
            eos_token_id=list(ends),
            **how,
        )
        found.update(zip(chosen, (_ended(row, ends) for row in tokens[:, longest:].tolist()), strict=True))
    return [found[i] for i in range(len(prompts))]


def _ended(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Up to the first end token, which is kept."""
    first = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: first + 1]


@torch.no_grad()
def score(model: Any, pairs: Sequence[tuple[list[int], list[int]]], pad: int, rows: int) -> list[Output]:
    """Prompts with their outputs, by a model with a fused head (`fuse`)."""
    found = []
    for start in range(0, len(pairs), rows):
        some = pairs[start : start + rows]
        batch = {name: tensor.to(model.device) for name, tensor in collate(some, pad).items()}
        scored = model(**batch, fused_lm_head=True)
        kept = (batch["labels"][:, 1:] != IGNORED).cpu()
        entropies, logprobs = scored.entropy.float().cpu(), scored.log_probs.float().cpu()
        for row, (prompt, output) in enumerate(some):
            numbers = (each[row][kept[row]].tolist() for each in (entropies, logprobs))
            found.append(Output(prompt, output, *numbers))
    return found


def fuse(model: Any) -> None:
    """Give a model TRL's fused head, before an adapter is put on: `model(**batch, fused_lm_head=True)` then returns
    `entropy` and `log_probs`, [rows, tokens - 1], both differentiable, zero where the label is -100."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
