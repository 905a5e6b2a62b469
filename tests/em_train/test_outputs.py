"""The entropy, its gradient and the log-probabilities against plain autograd in float64, which holds every logit."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import demo
from em_train import outputs
from em_train.prompts import Prompt

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 9001, "max_position_embeddings": 64, "initializer_range": 0.8}
PAIRS = [([5, 6, 7], [100, 8999, 1]), ([9], [42, 43, 44, 45, 46, 1]), ([3, 3, 3, 3], [1])]


def small(kind: str) -> Any:
    torch.manual_seed(3)
    if kind == "softcapped":
        config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=30.0, attn_implementation="eager")
        return Gemma2ForCausalLM(config).eval()
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=kind == "tied")).eval()


def plain(model: Any, batch: outputs.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropies and log-probabilities [rows, tokens - 1] by a second and a third tensor as large as the logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logp = logits.log_softmax(-1)
    kept = batch["labels"][:, 1:] != outputs.IGNORED
    labels = batch["labels"][:, 1:].clamp(min=0).unsqueeze(-1)
    return -(logp.exp() * logp).sum(-1) * kept, logp.gather(-1, labels).squeeze(-1) * kept


@pytest.mark.parametrize("kind", ["tied", "untied", "softcapped"])
def test_entropies_and_their_gradient_are_those_of_float64_autograd(kind: str):
    model, exact = small(kind), small(kind).double()
    exact.load_state_dict(model.state_dict())
    outputs.fuse(model)
    batch = outputs.collate(PAIRS, pad=0)
    entropies, logprobs = plain(exact, batch)
    scored = model(**batch, fused_lm_head=True)
    assert entropies[entropies > 0].std() > 0.1, "all the same would prove little"
    torch.testing.assert_close(scored.entropy.double(), entropies, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scored.log_probs.double(), logprobs, rtol=1e-5, atol=1e-5)
    # A sum with weights: each token's own gradient has to be right, in every weight, below and in the head.
    weights = torch.linspace(1, 2, entropies.numel()).view(entropies.shape)
    (scored.entropy * weights).sum().backward()
    (entropies * weights.double()).sum().backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 1e-4 * theirs.grad.norm(), name


def test_collate_labels_the_outputs_tokens_alone():
    batch = outputs.collate([([5, 6], [7, 1]), ([5], [1])], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [5, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 1], [-100, 1, -100, -100]]


@pytest.fixture(scope="module")
def model() -> Any:
    found = AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH, dtype=torch.float32).eval()
    outputs.fuse(found)
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.MODEL_PATH)


def test_scored_outputs_have_their_own_tokens_alone(model: Any, tokenizer: Any):
    """Whatever they are padded to, and in whatever company."""
    prompts = [outputs.encode(tokenizer, Prompt(text)) for text in ("12+7*3-4", "1+1")]
    ends = outputs.end_tokens(model, tokenizer)
    drawn = outputs.draw(model, prompts, tokenizer.pad_token_id, ends, 80, temperature=0, rows=2)
    pairs = list(zip(prompts, drawn, strict=True))
    together = outputs.score(model, pairs, pad=0, rows=2)
    for output, pair in zip(together, pairs, strict=True):
        [alone] = outputs.score(model, [pair], pad=0, rows=1)
        assert (output.prompt_ids, output.token_ids) == pair
        assert len(output.entropies) == len(output.logprobs) == len(pair[1])
        assert output.entropies == pytest.approx(alone.entropies, abs=1e-5)
        assert output.entropy == pytest.approx(sum(alone.entropies) / len(pair[1]), abs=1e-6)
        assert output.token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(drawn[1], skip_special_tokens=True).endswith("\\boxed{2}")


def test_drawn_tokens_follow_the_models_distribution(model: Any, tokenizer: Any):
    prompt = tokenizer("Q")["input_ids"]
    torch.manual_seed(5)
    drawn = outputs.draw(model, [prompt] * 4000, 0, [1], max_tokens=1, temperature=1.0, rows=1000)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=len(wanted))
    assert (counts > 0).sum() > 50, "transformers' default of the 50 likeliest tokens"
    assert (counts / 4000 - wanted).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_bare_text_and_chats(tokenizer: Any):
    plain = outputs.encode(tokenizer, Prompt("1+1"), plain=True)
    assert plain == tokenizer("1+1")["input_ids"]
    chat = outputs.encode(tokenizer, Prompt([{"role": "user", "content": "1+1"}]))
    assert chat == outputs.encode(tokenizer, Prompt("1+1")) != plain
