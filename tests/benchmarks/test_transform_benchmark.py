"""The benchmark of the transform: its inputs, what it compares with, and that it runs. No assertion is about time."""

import csv
import math

import numpy as np
import pytest
import torch

from benchmarks.arms import ARMS, adam_steps, descent
from benchmarks.cases import Case
from benchmarks.logits import language_model_logits
from benchmarks.released import ReleasedProcessor, released
from benchmarks.transform import main
from em_sampler import EMInfParams, transform
from em_sampler.transforms import reference

VOCAB = 3_000
QUICK = ["--quick", "--device", "cpu", "--vocab", "300", "--threads", str(torch.get_num_threads())]


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


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_released_method_agrees_with_the_oracle(optimizer):
    params = EMInfParams(threshold=0.5, steps=8, kl_weight=0.01, optimizer=optimizer)
    logits = language_model_logits(4, 200, origin="float32")
    logits[0, 7] = -torch.inf
    found = released(logits, params)
    for row, got in zip(logits, found, strict=True):
        want, _ = reference.em_inf(row.double().numpy(), params)
        np.testing.assert_allclose(got.double().numpy(), want, atol=1e-4)
    with torch.no_grad():  # as `generate` runs it
        scores = ReleasedProcessor(params)(torch.zeros(4, 1, dtype=torch.long), logits)
    torch.testing.assert_close(scores, found)


def test_what_is_compiled_agrees_with_the_batched_form():
    case = Case(rows=4, vocab=200, steps=7, share=0.5)
    logits = language_model_logits(4, 200, origin="bfloat16")
    want, got = transform(logits.clone(), case.params()).logits, logits.clone()
    descent(case, logits.device, adam_steps)(got)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert torch.equal(got[0], logits[0])  # an idle row


@pytest.mark.parametrize(("share", "active"), [(0.0, 0), (0.2, 3), (1.0, 16)])
def test_a_case_has_its_share_of_active_rows(share, active):
    params = Case(rows=16, vocab=200, share=share).params()
    assert sum(p.threshold == 0 for p in params) == active


def test_a_run_writes_every_figure_and_a_plot(tmp_path, capsys):
    assert main([*QUICK, "--arms", "eager,released", "--rows", "1,2", "--out", str(tmp_path)]) == 0
    with (tmp_path / "transform.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["arm"] for line in lines} == {"eager", "released"}
    assert {line["method"] for line in lines if line["arm"] == "released"} == {"adam", "sgd"}
    for line in lines:
        assert line["status"] == "ok" and int(line["rounds"]) >= 3
        low, median, high = (float(line[f"x_log_softmax{suffix}"]) for suffix in ("_low", "", "_high"))
        assert 0 < low <= median <= high < math.inf
        moved = 8 * int(line["rows"]) * int(line["vocab"])
        assert float(line["gb_per_s"]) == pytest.approx(moved / float(line["time_us"]) / 1e3, rel=1e-4)
    assert (tmp_path / "transform.png").read_bytes().startswith(b"\x89PNG")
    assert "| 64 steps |" in capsys.readouterr().out


def test_an_arm_that_fails_is_a_line_and_the_status(tmp_path, monkeypatch):
    def broken(case, device):
        raise RuntimeError("no such kernel\nat all")

    monkeypatch.setitem(ARMS, "ours", broken)
    assert main([*QUICK, "--arms", "ours,eager", "--rows", "1", "--out", str(tmp_path)]) == 1
    with (tmp_path / "transform.csv").open(newline="") as file:
        states = {line["arm"]: line["status"] for line in csv.DictReader(file)}
    assert states == {"ours": "failed: RuntimeError: no such kernel", "eager": "ok"}
