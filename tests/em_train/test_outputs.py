"""A model's outputs: encoded, generated, collated and scored."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import demo
from em_train import outputs
from em_train.model import add_fused_head
from em_train.prompts import Prompt


def test_collate_labels_only_the_outputs_tokens():
    batch = outputs.collate([([5, 6], [7, 1]), ([5], [1])], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [5, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 1], [-100, 1, -100, -100]]


@pytest.fixture(scope="module")
def model() -> Any:
    found = AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH, dtype=torch.float32).eval()
    add_fused_head(found)
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.MODEL_PATH)


def test_a_score_does_not_depend_on_padding_or_on_the_other_rows(model: Any, tokenizer: Any):
    prompts = [outputs.encode(tokenizer, Prompt(text)) for text in ("12+7*3-4", "1+1")]
    eos_ids = outputs.find_eos_ids(model, tokenizer)
    generated = outputs.generate(model, prompts, tokenizer.pad_token_id, eos_ids, 80, temperature=0, batch_size=2)
    pairs = list(zip(prompts, generated, strict=True))
    together = outputs.score(model, pairs, pad_id=0, batch_size=2)
    for output, pair in zip(together, pairs, strict=True):
        [alone] = outputs.score(model, [pair], pad_id=0, batch_size=1)
        assert (output.prompt_ids, output.token_ids) == pair
        assert len(output.entropies) == len(output.logprobs) == len(pair[1])
        assert output.entropies == pytest.approx(alone.entropies, abs=1e-5)
        assert output.entropy == pytest.approx(sum(alone.entropies) / len(pair[1]), abs=1e-6)
        assert output.token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(generated[1], skip_special_tokens=True).endswith("\\boxed{2}")


def test_generated_tokens_follow_the_models_distribution(model: Any, tokenizer: Any):
    prompt = tokenizer("Q")["input_ids"]
    torch.manual_seed(5)
    generated = outputs.generate(model, [prompt] * 4000, 0, [1], max_tokens=1, temperature=1.0, batch_size=1000)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor(generated).flatten(), minlength=len(wanted))
    assert (counts > 0).sum() > 50, "sampled from the 50 likeliest tokens alone, which is transformers' default"
    assert (counts / 4000 - wanted).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_the_chat_template_is_applied_unless_it_is_disabled(tokenizer: Any):
    plain = outputs.encode(tokenizer, Prompt("1+1"), no_chat_template=True)
    assert plain == tokenizer("1+1")["input_ids"]
    chat = outputs.encode(tokenizer, Prompt([{"role": "user", "content": "1+1"}]))
    assert chat == outputs.encode(tokenizer, Prompt("1+1")) != plain
