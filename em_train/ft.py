"""EM-FT: transformers' trainer with the mean token entropy of the model's own outputs as its loss."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from transformers import Trainer

from em_train import outputs
from em_train.probe import Guarded
from em_train.settings import FtSettings


class EntropyTrainer(Guarded, Trainer):
    """Rows of its dataset are {"prompt_ids": [...]}, with "output_ids" where the outputs are there already.

    The loss is H(pi(.|prompt, y<t)), nats, averaged over all output tokens of an optimizer step, whatever process or
    micro-batch they are in; with `kl_weight`, plus that much of KL(pi || base) on the same tokens, by the estimator
    k3 = q/p - 1 - log(q/p), which is never negative.
    """

    def __init__(self, settings: FtSettings, base: Any = None, **kwargs: Any) -> None:
        """`base`: frozen, for the KL where full weights are trained; under an adapter, the model without it."""
        super().__init__(**kwargs, data_collator=self._collated)
        self.settings = settings
        self.base = base
        self.model_accepts_loss_kwargs = True  # the loss is a mean over the tokens of all micro-batches
        self._waiting: list[Any] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """See the class; `inputs` is a Batch of em_train.outputs."""
        scored = model(**inputs, fused_lm_head=True)
        total: torch.Tensor = scored.entropy.sum()
        if self.settings.kl_weight:
            gap = self._base_logprobs(model, inputs) - scored.log_probs  # both 0 where there is no output
            total = total + self.settings.kl_weight * (gap.exp() - 1 - gap).sum()
        # Gradients are averaged over the processes; the tokens are counted over all of them.
        loss: torch.Tensor = total / num_items_in_batch * self.accelerator.num_processes
        return loss

    @torch.no_grad()
    def _base_logprobs(self, model: Any, inputs: Any) -> Any:
        if self.base is not None:
            return self.base(**inputs, fused_lm_head=True).log_probs
        with self.accelerator.unwrap_model(model).disable_adapter():
            return model(**inputs, fused_lm_head=True).log_probs

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of the next step; on-policy, those of `fresh_every` steps are sampled at a time."""
        if self.settings.fresh_every and not self._waiting:
            asked = list(islice(epoch_iterator, num_batches * self.settings.fresh_every))
            self._waiting = self._answered([batch["prompt_ids"] for batch in asked])
        if self.settings.fresh_every:
            epoch_iterator = iter(self._waiting[:num_batches])
            self._waiting = self._waiting[num_batches:]
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _answered(self, batches: list[list[list[int]]]) -> list[outputs.Batch]:
        prompts = [prompt for batch in batches for prompt in batch]
        pad, probe = self.processing_class.pad_token_id, self.probe
        with self.generating(f"step {self.state.global_step}") as model:
            drawn = outputs.draw(model, prompts, pad, probe.ends, probe.max_tokens, probe.temperature, outputs.ROWS)
        pairs = iter(zip(prompts, drawn, strict=True))
        return [outputs.collate(list(islice(pairs, len(batch))), pad) for batch in batches]

    def _collated(self, rows: list[dict[str, list[int]]]) -> Any:
        if self.settings.fresh_every:
            return {"prompt_ids": [row["prompt_ids"] for row in rows]}
        return outputs.collate(
            [(row["prompt_ids"], row["output_ids"]) for row in rows], self.processing_class.pad_token_id
        )
