"""EM-FT: its loss, the KL to the base model, and outputs that are drawn anew."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_train import outputs
from em_train.prompts import Prompt
from tests.em_train.support import SMALL, curve, ft, trained, write_outputs, write_prompts

DATA = 8  # outputs in the file, as many as in a step


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_outputs(tmp_path_factory.mktemp("data") / "outputs.jsonl", DATA)


def mean_entropy(data: Path, model: Any = None) -> float:
    """Over all tokens of the file's outputs, by the float64 logits."""
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


@pytest.mark.parametrize("micro", [1, 4, 8])
def test_the_loss_is_the_mean_over_all_tokens_however_they_are_split(micro: int, data: Path, tmp_path: Path):
    """Outputs differ in length: a mean of the micro-batches' means would be another number."""
    card = trained(ft(outputs=data, out=tmp_path / "o", micro_batch_size=micro))
    first, second = curve(card, "loss")
    assert first == pytest.approx(mean_entropy(data), rel=1e-4)
    assert second < first  # the same outputs again, after a step
    assert card["ended"] == "all 2 steps were taken"


def test_the_weights_in_the_folder_have_less_entropy(data: Path, tmp_path: Path):
    settings = ft(outputs=data, out=tmp_path / "o", steps=4)
    trained(settings)
    after = AutoModelForCausalLM.from_pretrained(settings.out, dtype=torch.float64).eval()
    assert mean_entropy(data, after) < 0.9 * mean_entropy(data)
    assert AutoTokenizer.from_pretrained(settings.out).chat_template


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_kl_holds_the_model_to_its_base(lora_rank: int, data: Path, tmp_path: Path):
    """It is nothing before the first step, and with much weight the entropy hardly falls."""
    shared = {"outputs": data, "steps": 4, "lora_rank": lora_rank, "learning_rate": 1e-2 if lora_rank else 1e-3}
    free = trained(ft(out=tmp_path / "free", **shared))
    held = trained(ft(out=tmp_path / "held", kl_weight=100, **shared))
    assert curve(held, "loss")[0] == pytest.approx(curve(free, "loss")[0], rel=1e-4)
    assert curve(held, "loss")[-1] > 1.5 * curve(free, "loss")[-1]


def test_fresh_outputs_come_from_the_model_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every two steps, for the prompts of two steps, in float32; each prompt before any comes twice."""
    asked: list[list[list[int]]] = []
    draw = outputs.draw

    def drawn(model: Any, prompts: Any, *arguments: Any) -> Any:
        if model.training is False and len(prompts) == 16:
            asked.append(prompts)
        return draw(model, prompts, *arguments)

    monkeypatch.setattr(outputs, "draw", drawn)
    prompts = write_prompts(tmp_path / "p", 32)
    card = trained(ft(prompts=str(prompts), out=tmp_path / "o", fresh_every=2, steps=4, learning_rate=1e-3))
    assert len(asked) == 2
    assert len({tuple(prompt) for batch in asked for prompt in batch}) == 32
    assert len(curve(card, "loss")) == 4


def test_a_step_is_one_of_adamw_on_the_entropy(data: Path, tmp_path: Path):
    """The first update of Adam is the sign of the gradient times the rate, where the gradient is not tiny."""
    settings = ft(outputs=data, out=tmp_path / "o", steps=1, eval_every=1)
    trained(settings)
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
