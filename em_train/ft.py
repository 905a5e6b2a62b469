"""EM-FT: transformers' trainer with the mean token entropy of the model's own outputs as its loss."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from transformers import Trainer

from em_train import outputs
from em_train.evaluation import GuardedTrainerMixin
from em_train.settings import FtSettings


class EntropyTrainer(GuardedTrainerMixin, Trainer):
    """A trainer whose dataset has rows {"prompt_ids": [...]}, with "output_ids" unless outputs are sampled on-policy.

    The loss is H(pi(.|prompt, y<t)), nats, averaged over all output tokens of an optimizer step, in all processes and
    micro-batches; `kl_weight` adds that multiple of KL(pi || base) on the same tokens, by the estimator
    k3 = q/p - 1 - log(q/p), which is never negative.
    """

    def __init__(self, settings: FtSettings, base: Any = None, **kwargs: Any) -> None:
        """Take `base`, the frozen model of the KL, if full weights are trained; an adapter is disabled instead."""
        super().__init__(**kwargs, data_collator=self._collate)
        self.settings = settings
        self.base = base
        self.model_accepts_loss_kwargs = True  # the loss is a mean over the tokens of all micro-batches
        self._sampled: list[outputs.Batch] = []  # on-policy batches that no step has used yet

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the loss of one micro-batch, an `outputs.Batch`; `num_items_in_batch` counts the step's tokens."""
        scored = model(**inputs, fused_lm_head=True)
        total: torch.Tensor = scored.entropy.sum()
        if self.settings.kl_weight:
            log_ratio = self._base_logprobs(model, inputs) - scored.log_probs  # log(q/p); 0 outside outputs
            total = total + self.settings.kl_weight * (log_ratio.exp() - 1 - log_ratio).sum()
        # Gradients are averaged over the processes, but tokens are counted over all of them.
        loss: torch.Tensor = total / num_items_in_batch * self.accelerator.num_processes
        return loss

    @torch.no_grad()
    def _base_logprobs(self, model: Any, inputs: Any) -> Any:
        if self.base is not None:
            return self.base(**inputs, fused_lm_head=True).log_probs
        with self.accelerator.unwrap_model(model).disable_adapter():
            return model(**inputs, fused_lm_head=True).log_probs

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of the next step; on-policy, outputs for `fresh_every` steps are sampled at once."""
        if self.settings.fresh_every and not self._sampled:
            batches = list(islice(epoch_iterator, num_batches * self.settings.fresh_every))
            self._sampled = self._sample([batch["prompt_ids"] for batch in batches])
        if self.settings.fresh_every:
            epoch_iterator = iter(self._sampled[:num_batches])
            self._sampled = self._sampled[num_batches:]
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _sample(self, batches: list[list[list[int]]]) -> list[outputs.Batch]:
        """Return the batches of prompts with an output to each prompt, sampled from the current model."""
        prompts = [prompt for batch in batches for prompt in batch]
        pad_id, plan = self.processing_class.pad_token_id, self.evaluation_plan
        with self.generating(f"step {self.state.global_step}") as model:
            sampled = outputs.generate(model, prompts, pad_id, plan.eos_ids, plan.max_tokens, plan.temperature)
        pairs = iter(zip(prompts, sampled, strict=True))
        return [outputs.collate(list(islice(pairs, len(batch))), pad_id) for batch in batches]

    def _collate(self, rows: list[dict[str, list[int]]]) -> Any:
        if self.settings.fresh_every:
            return {"prompt_ids": [row["prompt_ids"] for row in rows]}
        pairs = [(row["prompt_ids"], row["output_ids"]) for row in rows]
        return outputs.collate(pairs, self.processing_class.pad_token_id)
