"""The random logits have the entropies, the precision and the reproducibility that the benchmarks rely on."""

import torch

from benchmarks.transform.logits import language_model_logits

VOCAB = 3_000


def entropies(logits):
    return torch.distributions.Categorical(logits=logits.double()).entropy()


def bits_below_bfloat16(logits):
    return logits.view(torch.int32) & 0xFFFF


def test_logits_are_confident_in_some_rows_and_open_in_others():
    h = entropies(language_model_logits(256, VOCAB, origin="bfloat16"))
    assert h.min() < 0.05 and h.max() > 2.5
    assert 0.1 < (h < 0.3).float().mean() < 0.5


def test_logits_have_the_precision_of_their_origin():
    low = {o: bits_below_bfloat16(language_model_logits(4, VOCAB, origin=o)) for o in ("bfloat16", "float32")}
    assert (low["bfloat16"] == 0).all()
    assert (low["float32"] != 0).float().mean() > 0.99


def test_a_penalty_changes_a_few_hundred_tokens_and_the_leader():
    plain, penalised = (language_model_logits(4, VOCAB, origin=o) for o in ("bfloat16", "penalised"))
    changed = plain != penalised
    assert ((changed.sum(1) >= 300) & (changed.sum(1) <= 301)).all()
    assert (bits_below_bfloat16(penalised)[changed] != 0).float().mean() > 0.9
    leader = plain.argmax(1, keepdim=True)
    torch.testing.assert_close(penalised.gather(1, leader), plain.gather(1, leader) / 1.1)


def test_logits_are_the_same_again_and_in_a_larger_batch():
    few, many = (language_model_logits(rows, VOCAB, origin="float32", seed=3) for rows in (2, 70))
    torch.testing.assert_close(many[:2], few, rtol=0, atol=0)
    assert not torch.equal(language_model_logits(2, VOCAB, origin="float32", seed=4), few)
