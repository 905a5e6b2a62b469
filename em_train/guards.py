"""Guards: rules that stop a training run before the model collapses. Pure functions: no model, no files.

Minimising entropy for too long ends in short or repetitive outputs. Each guard compares the latest evaluation with the
first one, which is of the untrained model; the held-out score is compared with its best value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

NGRAM_TOKENS = 8


@dataclass(frozen=True)
class Evaluation:
    """Measurements of the model at one step, on outputs generated at that step.

    Attributes:
        entropy: mean over all tokens, nats.
        length: mean output length, tokens.
        repetition: mean over the outputs of `repetition`, 0 to 1.
        score: share of right greedy answers to the held-out prompts; None without held-out prompts.
        score_error: standard error of `score`.
    """

    entropy: float
    length: float
    repetition: float
    score: float | None = None
    score_error: float = 0.0


@dataclass(frozen=True)
class Limits:
    """The guards' limits; em_train/settings.py describes each."""

    entropy_floor: float
    shortest: float
    longest: float
    repetition_rise: float
    score_drop: float


def repetition(token_ids: Sequence[int]) -> float:
    """Return the share of 8-grams that occurred earlier in the same output; 0 for fewer than 9 tokens."""
    ngrams = [tuple(token_ids[i : i + NGRAM_TOKENS]) for i in range(len(token_ids) - NGRAM_TOKENS + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def violated_guard(evaluations: Sequence[Evaluation], limits: Limits) -> str | None:
    """Return why training must stop after the last of these evaluations, in words; None if it may continue."""
    first, last = evaluations[0], evaluations[-1]
    if last.entropy < limits.entropy_floor:
        return f"entropy {last.entropy:.4g} nats is below the floor of {limits.entropy_floor:g}"
    if last.length < limits.shortest * first.length:
        return f"outputs have shrunk from {first.length:.4g} tokens to {last.length:.4g}"
    if last.length > limits.longest * first.length:
        return f"outputs have grown from {first.length:.4g} tokens to {last.length:.4g}"
    if last.repetition > first.repetition + limits.repetition_rise:
        return (
            f"the share of repeated {NGRAM_TOKENS}-grams has risen from {first.repetition:.3f} to {last.repetition:.3f}"
        )
    if last.score is not None:
        best = max(evaluation.score for evaluation in evaluations if evaluation.score is not None)
        if best - last.score > max(limits.score_drop, 2 * last.score_error):
            return f"the held-out score has fallen from {best:.3f} to {last.score:.3f}"
    return None
