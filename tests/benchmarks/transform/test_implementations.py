"""The compiled form agrees with em_sampler's transform."""

import torch

from benchmarks.transform.cases import Case
from benchmarks.transform.implementations import adam_steps, descent
from benchmarks.transform.logits import language_model_logits
from em_sampler.transforms import eager


def test_compiled_steps_agree_with_the_eager_transform():
    case = Case(rows=4, vocab=200, steps=7, share=0.5)
    logits = language_model_logits(4, 200, origin="bfloat16")
    want, got = eager.transform(logits.clone(), case.params()).logits, logits.clone()
    descent(case, logits.device, adam_steps)(got)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert torch.equal(got[0], logits[0])  # an idle row
