"""The model under training answers a few prompts: what the guards look at, and which checkpoint is kept.

`Guarded` gives a transformers or TRL trainer an `evaluate` of this kind; the trainer's own machinery does the rest (it
calls it every `eval_steps`, logs it, and loads the checkpoint with the best `eval_keep` at the end).
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
from em_train.guards import Check, Limits, broken, repetition
from em_train.prompts import InputError


@dataclass(frozen=True)
class Probe:
    """What is asked at each check.

    Attributes:
        prompts, held_out: token ids.
        answers: of the held-out prompts.
        ends: tokens that end an output.
        seed: of what is drawn.
    """

    prompts: Sequence[list[int]]
    held_out: Sequence[list[int]]
    answers: Sequence[str]
    answer: Answer
    limits: Limits
    ends: Sequence[int]
    max_tokens: int
    temperature: float
    seed: int


class Guarded:
    """A trainer that checks its model with a `probe`. Put before transformers' or TRL's trainer among the bases.

    Attributes:
        stopped: why a guard ended the training; None as long as none has.
    """

    probe: Probe
    stopped: str | None = None
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
        """A check of the model as it is now, logged; ends the training where a guard says so."""
        training = self.model.training
        self.model.eval()  # for its log too: TRL's trainers would take this for one of training
        check = self._check()
        self.stopped = broken([*self.checks(), check], self.probe.limits)
        if self.stopped and not self.state.global_step:
            raise InputError(f"the untrained model would be stopped at once: {self.stopped}")
        numbers = {f"{metric_key_prefix}_{name}": value for name, value in asdict(check).items() if value is not None}
        numbers[f"{metric_key_prefix}_keep"] = self._worth(check)
        self.log(dict(numbers))
        self.model.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, numbers)
        if self.stopped:
            self.control.should_training_stop = True
        return numbers

    def checks(self) -> list[Check]:
        """All checks so far, those before a resumed checkpoint too."""
        names = Check.__dataclass_fields__
        rows = [row for row in self.state.log_history if "eval_entropy" in row]
        return [Check(**{name: row[f"eval_{name}"] for name in names if f"eval_{name}" in row}) for row in rows]

    def _worth(self, check: Check) -> float:
        """The checkpoint with most is kept: the best score, without one the longest training that no guard minds."""
        if self.stopped:
            return -1.0
        return float(self.state.global_step) if check.score is None else check.score

    def _check(self) -> Check:
        probe, pad = self.probe, self.processing_class.pad_token_id
        mine, held_out = self._share(list(probe.prompts)), self._share(list(probe.held_out))
        with self.generating("check") as model:  # the same draws each time: checks differ by the model alone
            drawn = outputs.draw(model, mine, pad, probe.ends, probe.max_tokens, probe.temperature, outputs.ROWS)
            greedy = outputs.draw(model, held_out, pad, probe.ends, probe.max_tokens, 0.0, outputs.ROWS)
        scored = outputs.score(
            self.model, list(zip(mine, drawn, strict=True)), pad, self.args.per_device_train_batch_size
        )
        rows = gather_object([(sum(o.entropies), len(o.token_ids), repetition(o.token_ids)) for o in scored])
        entropies, lengths, repetitions = (list(column) for column in zip(*rows, strict=True))
        check = Check(sum(entropies) / sum(lengths), sum(lengths) / len(rows), sum(repetitions) / len(rows))
        if not held_out:
            return check
        answers = self._share(list(probe.answers))
        right = gather_object([self._is_right(ids, answer) for ids, answer in zip(greedy, answers, strict=True)])
        share = sum(right) / len(right)
        return Check(**asdict(check) | {"score": share, "score_error": math.sqrt(share * (1 - share) / len(right))})

    def _is_right(self, token_ids: list[int], answer: str) -> bool:
        reply = self.processing_class.decode(token_ids, skip_special_tokens=True)
        return is_right(self.probe.answer, reply, answer)

    def _share(self, items: list[Any]) -> list[Any]:
        """This process's items: as many for each, the first ones twice where they do not come out even."""
        world = self.accelerator.num_processes
        even = items + items[: -len(items) % world]
        return even[self.accelerator.process_index :: world]

    @contextlib.contextmanager
    def generating(self, draws: str) -> Iterator[Any]:
        """The model as `generate` wants it, under FSDP and DeepSpeed too (in the way of TRL's trainers).

        Args:
            draws: what is drawn. Seed, process and this decide it alone, and training's random state is left as it is,
                so that a run that is resumed, or checked more often, draws the same.
        """
        from trl.distributed import DistributedBackend
        from trl.models.utils import unwrap_model_for_generation

        backend = DistributedBackend(self.accelerator)  # type: ignore[no-untyped-call]
        training = self.model.training
        self.model.eval()
        with torch.random.fork_rng([self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(
                random.Random(f"{self.probe.seed} {self.accelerator.process_index} {draws}").getrandbits(63)
            )
            with (
                unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model,
                backend.summon_full_params(self.model_wrapped, recurse=False),
            ):
                yield model
        self.model.train(training)


def is_right(answer: Answer, reply: str, wanted: str) -> bool:
    """Whether the answer in a reply is the wanted one, written as in the data or as a bare value."""
    found = answer.extract(reply)
    return found is not None and found in (answer.extract(wanted), Answer(type="text").extract(wanted))
