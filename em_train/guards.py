"""What a check of the model under training measures, and when it ends the training. Pure: no model, no files.

Entropy that is minimised for too long ends in short or repeated outputs. Each rule compares a check with the first one,
which is that of the untrained model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

NGRAM = 8  # tokens


@dataclass(frozen=True)
class Check:
    """Measured on outputs that the model has just drawn.

    Attributes:
        entropy: mean over all tokens, nats.
        length: mean tokens an output.
        repetition: mean share of an output's 8-grams that it has already had.
        score, score_error: share of right answers to the held-out prompts (greedy), and its standard error.
    """

    entropy: float
    length: float
    repetition: float
    score: float | None = None
    score_error: float = 0.0


@dataclass(frozen=True)
class Limits:
    """As em_train/settings.py describes them."""

    entropy_floor: float
    shortest: float
    longest: float
    repetition_rise: float
    score_drop: float


def repetition(token_ids: Sequence[int]) -> float:
    """Share of the 8-grams that came before in the same output; 0 for an output of fewer than 9 tokens."""
    grams = [tuple(token_ids[i : i + NGRAM]) for i in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def broken(checks: Sequence[Check], limits: Limits) -> str | None:
    """Why training has to stop after the last of these checks, in words with the values; None: it may go on."""
    first, last = checks[0], checks[-1]
    if last.entropy < limits.entropy_floor:
        return f"entropy {last.entropy:.4g} nats is below the floor of {limits.entropy_floor:g}"
    if last.length < limits.shortest * first.length:
        return f"outputs have shrunk from {first.length:.4g} tokens to {last.length:.4g}"
    if last.length > limits.longest * first.length:
        return f"outputs have grown from {first.length:.4g} tokens to {last.length:.4g}"
    if last.repetition > first.repetition + limits.repetition_rise:
        return f"the share of repeated {NGRAM}-grams has risen from {first.repetition:.3f} to {last.repetition:.3f}"
    if last.score is not None:
        best = max(check.score for check in checks if check.score is not None)
        if best - last.score > max(limits.score_drop, 2 * last.score_error):
            return f"the held-out score has fallen from {best:.3f} to {last.score:.3f}"
    return None
