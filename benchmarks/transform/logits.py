"""Random logits with the shape of a language model's: the inputs of the benchmarks.

A Gaussian bulk has most of the tokens and little of the probability; a few candidates lie clearly above it.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Origin = Literal["bfloat16", "float32", "penalised"]

# The bulk's standard deviation, uniform, drawn for each row. Assumed, not fitted: at 2, the bulk of 150,000 tokens
# reaches 10 logits above its mean, and candidates lie at 15 to 25, where bfloat16 resolves an eighth of a logit.
BULK_SCALE = (1.5, 3.0)
# How many candidates a row has (log-uniform), and how many logits they lie below the first one (uniform).
MAX_CANDIDATES = 64
TRAIL = 3.0
# The first candidate's log-odds against the complete bulk (uniform). At the lower end the bulk, 10 nats wide, has a
# fifth of the probability; at the upper end a millionth. Entropies are from 0 to about 4 nats, half of them below 1.6.
LEAD = (1.5, 14.0)
PENALTY = 1.1
PENALISED_TOKENS = 300
CHUNK_ROWS = 64  # rows drawn at a time: the largest case is 1 GB, and is not in memory twice


def language_model_logits(
    rows: int, vocab: int, *, origin: Origin, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Return logits [rows, vocab] float32 on `device`: the same values each time, but others on CUDA than on the CPU.

    Args:
        rows: how many to draw; row i does not depend on how many follow it.
        vocab: size of the vocabulary; at least 2.
        origin: the precision before float32. bfloat16: rounded to it, as an engine's logits are. penalised: bfloat16,
            then a repetition penalty of 1.1 on one candidate and a few hundred other tokens, so that these are no
            longer bfloat16 values. float32: never rounded.
        seed: seed of the generators.
        device: where the logits are drawn: one thread of the CPU would need most of a minute for a run on CUDA.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.empty(rows, vocab, dtype=torch.float32, device=device)
    on_cpu = logits.device.type == "cpu"
    bulk_generator = generator if on_cpu else torch.Generator(logits.device).manual_seed(seed)
    for chunk in torch.split(logits, CHUNK_ROWS):
        drawn = torch.stack([_row(vocab, generator, bulk_generator) for _ in range(len(chunk))])
        if origin != "float32":
            drawn = drawn.bfloat16().float()
        if origin == "penalised":
            _penalise(drawn)
        chunk.copy_(drawn)
    return logits


def _row(vocab: int, generator: torch.Generator, bulk_generator: torch.Generator) -> Tensor:  # [vocab]
    """Draw one row, so that it does not depend on how many are drawn; the bulk on the device of its generator."""
    device = bulk_generator.device
    scale, count, lead = torch.rand(3, generator=generator).tolist()
    scale = BULK_SCALE[0] + (BULK_SCALE[1] - BULK_SCALE[0]) * scale
    count = min(vocab // 2, int((MAX_CANDIDATES + 1) ** count))
    lead = LEAD[0] + (LEAD[1] - LEAD[0]) * lead
    row = torch.randn(vocab, generator=bulk_generator, device=device).mul_(scale)
    mass = math.log(vocab) + scale**2 / 2  # log-sum-exp of the bulk
    trail = TRAIL * torch.rand(count, generator=generator)
    trail[0] = 0
    row[_tokens(count, vocab, device)] = (mass + lead - trail).to(device)
    return row


def _tokens(count: int, vocab: int, device: torch.device) -> Tensor:
    """Return `count` different tokens (int64), spread evenly over the vocabulary."""
    return (torch.arange(count, device=device) + 1) * (vocab // (count + 1))


def _penalise(logits: Tensor) -> None:
    """Apply vLLM's repetition penalty in place: it divides logits above 0 and multiplies the others."""
    tokens = min(PENALISED_TOKENS, logits.shape[1] // 4)
    for row in logits:
        chosen = torch.unique(torch.cat([row.argmax().reshape(1), _tokens(tokens, len(row), row.device)]))
        values = row[chosen]
        row[chosen] = torch.where(values > 0, values / PENALTY, values * PENALTY)
