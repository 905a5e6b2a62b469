"""Evaluates a model on problems under one decoding, by transformers, in a process of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.training.configs import MAX_TOKENS, SAMPLES_PER_PROBLEM
from demo.problems import Problem, check

DECODINGS = ("sampled", "greedy", "em_inf")


@dataclass(frozen=True)
class Evaluation:
    """One model under one decoding: means over problems and samples."""

    accuracy: float
    entropy: float  # nats per token, of the model itself, without EM-INF
    length: float  # tokens of a reply


def evaluate(model: Path, decoding: str, seed: int, problems: Sequence[Problem]) -> Evaluation:
    """Let the model answer `problems`: once if greedy, else SAMPLES_PER_PROBLEM times each at temperature 1."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from em_sampler.huggingface import EntropyMinimizer
    from em_sampler.params import EMInfParams
    from em_train import outputs
    from em_train.model import add_fused_head
    from em_train.prompts import Prompt

    torch.set_num_threads(1)
    torch.manual_seed(1000 + seed)  # training uses none of these seeds
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.eval()
    add_fused_head(loaded)
    generating: Any = loaded
    if decoding == "em_inf":
        generating = _ModelWithProcessors(loaded, [EntropyMinimizer(EMInfParams())])
    asked = list(problems) * (1 if decoding == "greedy" else SAMPLES_PER_PROBLEM)
    prompts = [outputs.encode(tokenizer, Prompt(problem.question)) for problem in asked]
    temperature = 0.0 if decoding == "greedy" else 1.0
    pad_id, eos_ids = tokenizer.pad_token_id, outputs.find_eos_ids(loaded, tokenizer)
    generated = outputs.generate(generating, prompts, pad_id, eos_ids, MAX_TOKENS, temperature, batch_size=256)
    scored = outputs.score(loaded, list(zip(prompts, generated, strict=True)), pad_id, batch_size=64)
    replies = tokenizer.batch_decode(generated, skip_special_tokens=True)
    tokens = sum(len(output.token_ids) for output in scored)
    return Evaluation(
        accuracy=sum(map(check, asked, replies)) / len(asked),
        entropy=sum(sum(output.entropies) for output in scored) / tokens,
        length=tokens / len(asked),
    )


class _ModelWithProcessors:
    """A model whose `generate` always uses the given logits processors."""

    def __init__(self, model: Any, processors: list[Any]) -> None:
        self.device = model.device
        self._model, self._processors = model, processors

    def generate(self, **arguments: Any) -> Any:
        return self._model.generate(**arguments, logits_processor=self._processors)
