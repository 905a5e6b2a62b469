"""The logits processor for `transformers`, in `generate` of the demo model."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

import demo
from em_sampler import EMInfParams
from em_sampler.huggingface import EntropyMinimizer
from em_sampler.params import METHODS
from em_sampler.transforms.batch import BatchParams
from em_sampler.transforms.numba_cpu import NumbaTransform

STRONG = EMInfParams(threshold=0.0, steps=64, learning_rate=1.0)


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    return AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH).eval()


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    chat = [{"role": "user", "content": "58+17*3-29"}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def generate(model, prompt, processors=(), **options):  # type: ignore[no-untyped-def]
    torch.manual_seed(5)
    processors = LogitsProcessorList(processors)
    return model.generate(prompt, max_new_tokens=24, logits_processor=processors, top_k=0, **options)


def test_greedy_decoding_keeps_its_tokens(model, prompt) -> None:  # type: ignore[no-untyped-def]
    plain = generate(model, prompt, do_sample=False)
    assert torch.equal(generate(model, prompt, [EntropyMinimizer(STRONG)], do_sample=False), plain)


def test_strong_minimisation_makes_sampling_greedy(model, prompt) -> None:  # type: ignore[no-untyped-def]
    """At a high temperature plain sampling leaves the greedy path; with entropies close to 0 it cannot.

    This also shows that the processor runs before the temperature: after it, the temperature would have no effect left.
    """
    batch = prompt.expand(8, -1)
    greedy = generate(model, prompt, do_sample=False).expand(8, -1)
    assert not torch.equal(generate(model, batch, do_sample=True, temperature=1.5)[:, : greedy.shape[1]], greedy)
    processor = EntropyMinimizer(STRONG)
    minimised = generate(model, batch, [processor], do_sample=True, temperature=1.5)
    assert torch.equal(minimised, greedy)
    assert processor.last is not None
    assert processor.last.entropy_after.max() < 1e-3


def test_beam_search_gets_log_probabilities(model, prompt) -> None:  # type: ignore[no-untyped-def]
    """Scores of a beam are sums of log-probabilities, so no row may be normalised to more than 1."""
    options = {"do_sample": False, "num_beams": 4, "return_dict_in_generate": True, "output_scores": True}
    found = generate(model, prompt, [EntropyMinimizer(EMInfParams(threshold=0.1, steps=20))], **options)
    normalizers = torch.stack([scores.logsumexp(-1) for scores in found.scores])
    torch.testing.assert_close(normalizers, torch.zeros_like(normalizers), atol=1e-4, rtol=0)
    assert found.sequences_scores.max() <= 0
    again = generate(
        model, prompt, [EntropyMinimizer(EMInfParams(threshold=0.1, steps=20))], **options, renormalize_logits=True
    )
    assert torch.equal(found.sequences, again.sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("params", [method() for method in METHODS.values()], ids=list(METHODS))
def test_scores_are_the_log_probabilities_of_the_transform(params, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    scores = (torch.randn(4, 300, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    kept = scores.clone()
    processor = EntropyMinimizer(params, temperature=0.7)
    out = processor(torch.zeros(4, 1, dtype=torch.long), scores)
    wanted = NumbaTransform(300)(
        kept.to(torch.float32, copy=True), BatchParams.of([params] * 4, temperatures=[0.7] * 4)
    )
    assert torch.equal(out, wanted.logits.log_softmax(-1).to(dtype))
    assert out.dtype == dtype
    assert torch.equal(scores, kept)
    assert processor.last is not None
    assert torch.equal(processor.last.entropy_before, wanted.entropy_before)
