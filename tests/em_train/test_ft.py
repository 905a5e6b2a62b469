"""EM-FT: its loss, the KL to the base model, and on-policy outputs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_train import outputs
from em_train.prompts import Prompt
from tests.em_train.support import SMALL, curve, ft, train


def mean_entropy(data: Path, model: Any = None) -> float:
    """Return the mean over all tokens of the file's outputs, from float64 logits."""
    tokenizer = AutoTokenizer.from_pretrained(SMALL["model"])
    model = model or AutoModelForCausalLM.from_pretrained(SMALL["model"], dtype=torch.float64).eval()
    found = []
    for row in map(json.loads, data.read_text().splitlines()):
        prompt = outputs.encode(tokenizer, Prompt(row["prompt"]))
        output = tokenizer(row["output"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logp = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found += (-(logp.exp() * logp).sum(-1)).tolist()
    return sum(found) / len(found)


@pytest.mark.parametrize("micro", [1, *(pytest.param(micro, marks=pytest.mark.slow) for micro in (4, 8))])
def test_the_loss_is_the_mean_over_all_tokens_however_they_are_split(micro: int, data: Path, tmp_path: Path):
    """Outputs differ in length: the mean of the micro-batches' means would be another number."""
    report = train(ft(outputs=data, out=tmp_path / "o", micro_batch_size=micro))
    first, second = curve(report, "loss")
    assert first == pytest.approx(mean_entropy(data), rel=1e-4)
    assert second < first  # the same outputs again, after a step
    assert report["ended"] == "all 2 steps were taken"


@pytest.mark.slow
def test_the_saved_weights_have_less_entropy(data: Path, tmp_path: Path):
    settings = ft(outputs=data, out=tmp_path / "o", steps=4, eval_every=4)
    train(settings)
    after = AutoModelForCausalLM.from_pretrained(settings.out, dtype=torch.float64).eval()
    assert mean_entropy(data, after) < 0.9 * mean_entropy(data)
    assert AutoTokenizer.from_pretrained(settings.out).chat_template


@pytest.mark.parametrize("lora_rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_the_kl_keeps_the_model_near_its_base(lora_rank: int, data: Path, tmp_path: Path):
    """The KL is 0 before the first step, and with a large weight the entropy hardly falls."""
    shared = {"outputs": data, "steps": 4, "eval_every": 4, "lora_rank": lora_rank}
    shared["learning_rate"] = 1e-2 if lora_rank else 1e-3
    free = train(ft(out=tmp_path / "free", **shared))
    near = train(ft(out=tmp_path / "near", kl_weight=100, **shared))
    assert curve(near, "loss")[0] == pytest.approx(curve(free, "loss")[0], rel=1e-4)
    assert curve(near, "loss")[-1] > 1.5 * curve(free, "loss")[-1]


def test_on_policy_outputs_are_sampled_every_two_steps(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each time for the prompts of two steps, in evaluation mode; each prompt once before any comes twice."""
    sampled: list[list[list[int]]] = []
    generate = outputs.generate

    def spy(model: Any, prompts: Any, *arguments: Any, **more: Any) -> Any:
        if model.training is False and len(prompts) == 16:
            sampled.append(prompts)
        return generate(model, prompts, *arguments, **more)

    monkeypatch.setattr(outputs, "generate", spy)
    report = train(
        ft(prompts=str(prompts), out=tmp_path / "o", fresh_every=2, steps=4, eval_every=4, learning_rate=1e-3)
    )
    assert len(sampled) == 2
    assert len({tuple(prompt) for batch in sampled for prompt in batch}) == 32
    assert len(curve(report, "loss")) == 4


def test_a_step_is_an_adamw_step_on_the_mean_entropy(data: Path, tmp_path: Path):
    """The first update of Adam is the rate times the sign of the gradient, if the gradient is not tiny."""
    settings = ft(outputs=data, out=tmp_path / "o", steps=1, eval_every=1)
    train(settings)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float64).eval()
    after = AutoModelForCausalLM.from_pretrained(settings.out, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in map(json.loads, data.read_text().splitlines()):
        prompt = outputs.encode(tokenizer, Prompt(row["prompt"]))
        output = tokenizer(row["output"])["input_ids"] + [tokenizer.eos_token_id]
        logp = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = total - (logp.exp() * logp).sum()
        tokens += len(output)
    (total / tokens).backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    moved = after.model.layers[0].mlp.up_proj.weight - weight
    large = weight.grad.abs() > 0.1 * weight.grad.abs().max()
    assert large.sum() > 50
    torch.testing.assert_close(moved[large], -1e-4 * weight.grad.sign()[large], rtol=0.01, atol=1e-7)
