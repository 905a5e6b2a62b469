"""EM-RL: TRL's RLOO trainer, rewarded by the model's confidence in its own outputs."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from trl.trainer.rloo_trainer import RLOOTrainer

from answers.extract import Answer
from em_train.evaluation import GuardedTrainerMixin, is_right
from em_train.settings import RlSettings


class ConfidenceTrainer(GuardedTrainerMixin, RLOOTrainer):
    """RLOO whose reward is a function of the policy's own entropies and log-probabilities.

    RLOO scores each output with the policy before it computes rewards; the entropies of that pass, which RLOO does not
    use, are kept for the reward. There is no entropy bonus in the loss.
    """

    def __init__(self, settings: RlSettings, **kwargs: Any) -> None:
        self._confidence: tuple[torch.Tensor, torch.Tensor] | None = None  # log-probabilities, entropies [rows, tokens]
        super().__init__(reward_funcs=[self._reward_function(settings)], **kwargs)

    def _reward_function(self, settings: RlSettings) -> Callable[..., Any]:
        rule = Answer(type=settings.answer)

        def correct(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
            return [float(is_right(rule, _text(c), wanted)) for c, wanted in zip(completions, answer, strict=True)]

        def confidence(completion_ids: Sequence[list[int]], **_: Any) -> list[float]:
            assert self._confidence is not None
            logprobs, entropies = self._confidence
            return rewards(settings.reward, settings.reduce, logprobs, entropies, [len(ids) for ids in completion_ids])

        confidence.__name__ = f"{settings.reward}_{settings.reduce}"  # TRL logs the reward under this name
        return correct if settings.reward == "correct" else confidence

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self._confidence = None
        return super()._generate_and_score_completions(inputs)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep the first result without gradients: TRL 1.16 scores first with the policy, then with the base model."""
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
    """Return one reward for each output, from the policy's confidence.

    Args:
        kind: "token" is -sum_t H_t; "sequence" is sum_t log pi(y_t|y<t), whose expectation is the former.
        reduce: "mean" divides by the output's length in tokens, end token included.
        logprobs: [outputs, tokens], nats; values beyond an output's length are ignored.
        entropies: likewise.
        lengths: tokens of each output.
    """
    values = -entropies if kind == "token" else logprobs
    sums = [values[row, :length].sum().item() for row, length in enumerate(lengths)]
    return sums if reduce == "sum" else [total / length for total, length in zip(sums, lengths, strict=True)]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]
