"""EM-RL: TRL's RLOO trainer, rewarded by the model's confidence in its own outputs."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from trl.trainer.rloo_trainer import RLOOTrainer

from answers.extract import Answer
from em_train.probe import Guarded, is_right
from em_train.settings import RlSettings


class ConfidenceTrainer(Guarded, RLOOTrainer):
    """RLOO whose reward is a function of the policy's own entropies and log-probabilities.

    RLOO scores each generation with the policy before it asks for rewards; the entropies of that pass, which it has
    no use for, are kept here for the reward. No entropy bonus is in the loss, and none is added.
    """

    def __init__(self, settings: RlSettings, **kwargs: Any) -> None:
        self._confidence: tuple[torch.Tensor, torch.Tensor] | None = None
        super().__init__(reward_funcs=[self._reward_of(settings)], **kwargs)

    def _reward_of(self, settings: RlSettings) -> Callable[..., Any]:
        place = Answer(type=settings.answer)

        def correct(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
            return [float(is_right(place, _text(c), wanted)) for c, wanted in zip(completions, answer, strict=True)]

        def confidence(completion_ids: Sequence[list[int]], **_: Any) -> list[float]:
            assert self._confidence is not None
            logprobs, entropies = self._confidence
            return rewards(settings.reward, settings.reduce, logprobs, entropies, [len(ids) for ids in completion_ids])

        confidence.__name__ = f"{settings.reward}_{settings.reduce}"
        return correct if settings.reward == "correct" else confidence

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self._confidence = None
        return super()._generate_and_score_completions(inputs)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL 1.16 calls it first for the policy (old log-probabilities), then for the base model."""
        if torch.is_grad_enabled() or self._confidence is not None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        scored = super()._get_per_token_logps_and_entropies(model, *args, **kwargs | {"compute_entropy": True})
        self._confidence = scored[0], scored[1]
        return scored


def rewards(
    kind: Literal["token", "sequence", "correct"],
    reduce: Literal["sum", "mean"],
    logprobs: torch.Tensor,
    entropies: torch.Tensor,
    lengths: Sequence[int],
) -> list[float]:
    """Rewards of outputs by the policy's confidence, one for each.

    Args:
        kind: "token": -sum_t H_t. "sequence": sum_t log pi(y_t|y<t), of which it is the expectation.
        reduce: "mean" divides by the output's tokens, end token included.
        logprobs, entropies: [outputs, tokens], nats; what is behind an output's length is not looked at.
        lengths: tokens of each output.
    """
    values = -entropies if kind == "token" else logprobs
    sums = [values[row, :length].sum().item() for row, length in enumerate(lengths)]
    return sums if reduce == "sum" else [each / length for each, length in zip(sums, lengths, strict=True)]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]
