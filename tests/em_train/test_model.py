"""The fused head: entropy, gradient and log-probabilities against plain autograd in float64, which holds all logits."""

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from em_train import outputs
from em_train.model import add_fused_head

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 9001, "max_position_embeddings": 64, "initializer_range": 0.8}
PAIRS = [([5, 6, 7], [100, 8999, 1]), ([9], [42, 43, 44, 45, 46, 1]), ([3, 3, 3, 3], [1])]


def small(kind: str) -> Any:
    torch.manual_seed(3)
    if kind == "softcapped":
        config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=30.0, attn_implementation="eager")
        return Gemma2ForCausalLM(config).eval()
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=kind == "tied")).eval()


def reference(model: Any, batch: outputs.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return entropies and log-probabilities, [rows, tokens - 1], with further tensors as large as the logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logp = logits.log_softmax(-1)
    kept = batch["labels"][:, 1:] != outputs.IGNORED
    labels = batch["labels"][:, 1:].clamp(min=0).unsqueeze(-1)
    return -(logp.exp() * logp).sum(-1) * kept, logp.gather(-1, labels).squeeze(-1) * kept


@pytest.mark.parametrize("kind", ["tied", "untied", "softcapped"])
def test_entropies_and_their_gradient_are_those_of_float64_autograd(kind: str):
    model, exact = small(kind), small(kind).double()
    exact.load_state_dict(model.state_dict())
    add_fused_head(model)
    batch = outputs.collate(PAIRS, pad_id=0)
    entropies, logprobs = reference(exact, batch)
    scored = model(**batch, fused_lm_head=True)
    assert entropies[entropies > 0].std() > 0.1, "equal entropies would prove little"
    torch.testing.assert_close(scored.entropy.double(), entropies, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scored.log_probs.double(), logprobs, rtol=1e-5, atol=1e-5)
    # A weighted sum: the gradient of each token must be right, in all weights, of the head and below it.
    weights = torch.linspace(1, 2, entropies.numel()).view(entropies.shape)
    (scored.entropy * weights).sum().backward()
    (entropies * weights.double()).sum().backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 1e-4 * theirs.grad.norm(), name
