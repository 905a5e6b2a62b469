"""Evaluation of the model under training: its outputs to a few prompts, for the guards and for choosing a checkpoint.

`GuardedTrainerMixin` replaces `evaluate` of a transformers or TRL trainer, which calls it every `eval_steps` steps and
at the end loads the checkpoint with the highest `eval_keep`.
"""

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from answers.extract import Answer
from em_train import outputs
from em_train.guards import Evaluation, Limits, repetition, violated_guard
from em_train.model import check_context_length
from em_train.prompts import InputError, Prompt, read_prompts
from em_train.settings import TrainSettings


@dataclass(frozen=True)
class EvaluationPlan:
    """What every evaluation asks, and how outputs are generated and judged.

    Attributes:
        prompts: token ids; answered at `temperature`, for entropy, length and repetition.
        held_out: token ids; answered greedily, for the score.
        answers: the right answers to the held-out prompts.
        answer_rule: how to find the answer in a reply.
        limits: the guards' limits.
        eos_ids: tokens that end an output.
        max_tokens: the longest output.
        temperature: at which outputs are sampled.
        seed: of the samples.
    """

    prompts: Sequence[list[int]]
    held_out: Sequence[list[int]]
    answers: Sequence[str]
    answer_rule: Answer
    limits: Limits
    eos_ids: Sequence[int]
    max_tokens: int
    temperature: float
    seed: int


def plan_evaluation(settings: TrainSettings, model: Any, tokenizer: Any, prompts: list[Prompt]) -> EvaluationPlan:
    """Return the plan for a run that trains on `prompts`.

    Raises:
        InputError: if the held-out prompts cannot be used, or a prompt and its output exceed the model's positions.
    """
    held_out = read_prompts(settings.held_out, flag="--held-out") if settings.held_out else []
    if any(prompt.answer is None for prompt in held_out):
        raise InputError(f"--held-out: {settings.held_out} has a row without `answer`")
    encoded, encoded_held_out = (
        [outputs.encode(tokenizer, prompt, settings.plain) for prompt in group] for group in (prompts, held_out)
    )
    check_context_length(settings, model, longest_prompt=max(map(len, encoded + encoded_held_out)))
    return EvaluationPlan(
        prompts=encoded[: settings.eval_prompts],
        held_out=encoded_held_out,
        answers=[prompt.answer or "" for prompt in held_out],
        answer_rule=Answer(type=settings.answer),
        limits=Limits(**{name: getattr(settings, name) for name in Limits.__dataclass_fields__}),
        eos_ids=outputs.find_eos_ids(model, tokenizer),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
    )


class GuardedTrainerMixin:
    """A trainer that evaluates its model by a plan and stops at a violated guard. Stands before the trainer's class.

    Attributes:
        evaluation_plan: set before training begins.
        stop_reason: which guard ended the training, in words; None if none has.
    """

    evaluation_plan: EvaluationPlan
    stop_reason: str | None = None
    model: Any
    model_wrapped: Any
    accelerator: Any
    args: Any
    state: Any
    control: Any
    callback_handler: Any
    processing_class: Any
    log: Any

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Evaluate the model, log the result and return it; a violated guard ends the training.

        Raises:
            InputError: if the untrained model already violates a guard.
        """
        was_training = self.model.training
        self.model.eval()  # also for `log`: TRL's trainers would otherwise log this as a training step
        evaluation = self._measure()
        self.stop_reason = violated_guard([*self.past_evaluations(), evaluation], self.evaluation_plan.limits)
        if self.stop_reason and not self.state.global_step:
            raise InputError(f"the untrained model would be stopped at once: {self.stop_reason}")
        metrics = {f"{metric_key_prefix}_{name}": v for name, v in asdict(evaluation).items() if v is not None}
        metrics[f"{metric_key_prefix}_keep"] = self._checkpoint_metric(evaluation)
        self.log(dict(metrics))
        self.model.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.stop_reason:
            self.control.should_training_stop = True
        return metrics

    def past_evaluations(self) -> list[Evaluation]:
        """Return all evaluations so far, including those before a resumed checkpoint."""
        names = Evaluation.__dataclass_fields__
        rows = [row for row in self.state.log_history if "eval_entropy" in row]
        return [Evaluation(**{name: row[f"eval_{name}"] for name in names if f"eval_{name}" in row}) for row in rows]

    def _checkpoint_metric(self, evaluation: Evaluation) -> float:
        """Return what selects the checkpoint: the held-out score or else the step; -1 if a guard is violated."""
        if self.stop_reason:
            return -1.0
        return float(self.state.global_step) if evaluation.score is None else evaluation.score

    def _measure(self) -> Evaluation:
        plan, pad_id = self.evaluation_plan, self.processing_class.pad_token_id
        prompts, held_out = self._shard(list(plan.prompts)), self._shard(list(plan.held_out))
        limits = (pad_id, plan.eos_ids, plan.max_tokens)
        with self.generating("check") as model:  # the same seed each time: evaluations differ by the model alone
            sampled = outputs.generate(model, prompts, *limits, plan.temperature)
            greedy = outputs.generate(model, held_out, *limits, temperature=0.0)
        pairs = list(zip(prompts, sampled, strict=True))
        scored = outputs.score(self.model, pairs, pad_id, self.args.per_device_train_batch_size)
        rows = gather_object([(sum(o.entropies), len(o.token_ids), repetition(o.token_ids)) for o in scored])
        entropies, lengths, repetitions = (list(column) for column in zip(*rows, strict=True))
        evaluation = Evaluation(sum(entropies) / sum(lengths), sum(lengths) / len(rows), sum(repetitions) / len(rows))
        if not held_out:
            return evaluation
        answers = self._shard(list(plan.answers))
        right = gather_object([self._is_right(ids, answer) for ids, answer in zip(greedy, answers, strict=True)])
        share = sum(right) / len(right)
        error = math.sqrt(share * (1 - share) / len(right))
        return Evaluation(**asdict(evaluation) | {"score": share, "score_error": error})

    def _is_right(self, token_ids: list[int], answer: str) -> bool:
        reply = self.processing_class.decode(token_ids, skip_special_tokens=True)
        return is_right(self.evaluation_plan.answer_rule, reply, answer)

    def _shard(self, items: list[Any]) -> list[Any]:
        """Return this process's items: equally many for each process, the first ones twice if they do not divide."""
        processes = self.accelerator.num_processes
        padded = items + items[: -len(items) % processes]
        return padded[self.accelerator.process_index :: processes]

    @contextlib.contextmanager
    def generating(self, purpose: str) -> Iterator[Any]:
        """Yield the model in the form that `generate` needs, under FSDP and DeepSpeed too (as TRL's trainers do).

        Args:
            purpose: what is sampled. The samples depend on seed, process and purpose alone, and training's random state
                is restored, so that a run that is resumed or evaluated more often samples the same outputs.
        """
        from trl.distributed import DistributedBackend
        from trl.models.utils import unwrap_model_for_generation

        backend = DistributedBackend(self.accelerator)  # type: ignore[no-untyped-call]
        was_training = self.model.training
        self.model.eval()
        with torch.random.fork_rng([self.model.device] if self.model.device.type == "cuda" else []):
            seed = f"{self.evaluation_plan.seed} {self.accelerator.process_index} {purpose}"
            torch.manual_seed(random.Random(seed).getrandbits(63))
            with (
                unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model,
                backend.summon_full_params(self.model_wrapped, recurse=False),
            ):
                yield model
        self.model.train(was_training)


def is_right(answer_rule: Answer, reply: str, wanted: str) -> bool:
    """Return whether the reply's answer is `wanted`, which may be written as in a reply or as a bare value."""
    found = answer_rule.extract(reply)
    return found is not None and found in (answer_rule.extract(wanted), answer_rule.normal_form(wanted))
