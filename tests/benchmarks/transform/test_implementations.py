"""The compiled form agrees with em_sampler's transform, and on CUDA ours is never the eager one."""

import pytest
import torch

from benchmarks.transform.cases import Case
from benchmarks.transform.implementations import adam_steps, descent, ours
from benchmarks.transform.logits import language_model_logits
from em_sampler.transforms import dispatch, eager, triton_cuda


def test_compiled_steps_agree_with_the_eager_transform():
    case = Case(rows=4, vocab=200, steps=7, share=0.5)
    logits = language_model_logits(4, 200, origin="bfloat16")
    want, got = eager.transform(logits.clone(), case.params()).logits, logits.clone()
    descent(case, logits.device, adam_steps)(got)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert torch.equal(got[0], logits[0])  # an idle row


def test_on_cuda_a_fallback_is_not_timed_as_ours(monkeypatch):
    def broken(*_):
        raise OSError("no\ncompiler")

    monkeypatch.setattr(triton_cuda, "TritonTransform", broken)
    monkeypatch.setattr(
        dispatch, "build_transform", lambda vocab, _, rows: eager.EagerTransform(vocab, torch.device("cpu"), rows)
    )
    with pytest.raises(RuntimeError, match="did not build: OSError: no compiler"):
        ours(Case(rows=1, vocab=50), torch.device("cuda"))
