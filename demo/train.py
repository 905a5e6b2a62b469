"""Training of the demo model from random weights, on problems of the training split alone.

`python -m demo.train --out demo/model`: on the CPU, seeded, a fixed number of steps. Only replies count in the loss.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from demo import MODEL_PATH
from demo.conversations import Turn, training_stream
from demo.tokenizer import CONTEXT_LENGTH, END_ID, PAD_ID, VOCABULARY, build_tokenizer, turn

STEPS: Final = 7_000
SEED: Final = 1
THREADS: Final = 1  # the result does not depend on the number of cores
BATCH_SIZE: Final = 32  # conversations
POOL_BATCHES: Final = 64  # batches sorted by length together, so that there is little padding
PEAK_LEARNING_RATE: Final = 2e-3
FINAL_LEARNING_RATE_SHARE: Final = 0.02
WARMUP_STEPS: Final = 200
WEIGHT_DECAY: Final = 0.05
MAX_GRADIENT_NORM: Final = 1.0
IGNORED: Final = -100  # the target that cross_entropy ignores
REPORT_EVERY: Final = 100  # steps


class Batch(NamedTuple):
    """Conversations padded on the right; a target is the next token, or IGNORED outside replies."""

    tokens: torch.Tensor  # [rows, positions]
    targets: torch.Tensor  # [rows, positions]


def build_model() -> Qwen2ForCausalLM:
    """Return an untrained model of 1.6 million parameters, with a head size that vLLM's CPU attention supports (32)."""
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]


def batches(seed: int) -> Iterator[Batch]:
    """Yield batches of training conversations, without end."""
    conversations = map(_with_targets, training_stream(seed))
    shuffler = random.Random(seed)
    while True:
        pool = sorted(islice(conversations, BATCH_SIZE * POOL_BATCHES), key=lambda pair: len(pair[0]))
        starts = list(range(0, len(pool), BATCH_SIZE))
        shuffler.shuffle(starts)
        for start in starts:
            yield _padded(pool[start : start + BATCH_SIZE])


def _with_targets(turns: list[Turn]) -> tuple[list[int], list[int]]:
    tokens: list[int] = []
    targets: list[int] = []
    for role, text in turns:
        ids = turn(role, text)
        tokens += ids
        # The chat template writes the opening token of a turn; the model never generates it.
        targets += [IGNORED, *ids[1:]] if role == "assistant" else [IGNORED] * len(ids)
    return tokens[:-1], targets[1:]


def _padded(rows: list[tuple[list[int], list[int]]]) -> Batch:
    width = max(len(tokens) for tokens, _ in rows)
    tokens = [row + [PAD_ID] * (width - len(row)) for row, _ in rows]
    targets = [row + [IGNORED] * (width - len(row)) for _, row in rows]
    return Batch(torch.tensor(tokens), torch.tensor(targets))


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: linear warm-up, then half a cosine down to FINAL_LEARNING_RATE_SHARE of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return PEAK_LEARNING_RATE * (FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * cosine)


def build_optimizer(model: Qwen2ForCausalLM) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices, not on norms and biases."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), fused=True)


def loss_of(model: Qwen2ForCausalLM, batch: Batch) -> torch.Tensor:
    """Return the mean cross-entropy over reply tokens, in nats."""
    # No attention mask: padding is on the right, where causal attention hides it from every real token.
    with torch.autocast("cpu", torch.bfloat16):
        logits: torch.Tensor = model(input_ids=batch.tokens, use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)


def train(steps: int, seed: int) -> Qwen2ForCausalLM:
    """Return a trained model in float32."""
    torch.manual_seed(seed)
    model = build_model()
    # At these lengths the backward pass of fused attention takes 1.5 times as long on a CPU.
    model.set_attn_implementation("eager")
    model.train()
    optimizer = build_optimizer(model)
    started, losses = time.monotonic(), 0.0
    for step, batch in enumerate(islice(batches(seed), steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses += loss.item()
        if (step + 1) % REPORT_EVERY == 0:
            elapsed = time.monotonic() - started
            print(f"step {step + 1}/{steps} loss {losses / REPORT_EVERY:.4f} {elapsed:.0f} s", flush=True)
            losses = 0.0
    model.train(False)
    return model


def save(model: Qwen2ForCausalLM, out: Path) -> None:
    """Write the folder that ships, in bfloat16: the dtype in which vLLM serves it by default."""
    model.bfloat16().save_pretrained(out)
    # Token ids only: sampling parameters here would become the server's defaults.
    generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID)  # type: ignore[no-untyped-call]
    generation_config.save_pretrained(out)
    build_tokenizer().save_pretrained(out)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_PATH)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    save(train(options.steps, options.seed), options.out)


if __name__ == "__main__":
    main()
