"""Which implementation runs where, and that its failure is said aloud."""

import logging

import pytest
import torch

from em_sampler import EMInfParams, transform
from em_sampler.transforms import dispatch
from em_sampler.transforms.batch import BatchParams
from em_sampler.transforms.dispatch import build_transform
from em_sampler.transforms.eager import EagerTransform
from em_sampler.transforms.numba_cpu import NumbaTransform

CPU = torch.device("cpu")


def test_the_cpu_counts() -> None:
    assert isinstance(build_transform(50, CPU, 4), NumbaTransform)


def test_a_device_without_one_of_its_own_has_the_reference() -> None:
    assert isinstance(build_transform(50, torch.device("meta"), 4), EagerTransform)


def test_what_does_not_work_is_replaced_with_one_loud_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> NumbaTransform:
        raise OSError("no compiler")

    monkeypatch.setitem(dispatch._ON, "cpu", broken)
    with caplog.at_level(logging.WARNING):
        engine = build_transform(50, CPU, 4)
    assert isinstance(engine, EagerTransform)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "OSError: no compiler" in caplog.text
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    wanted = transform(logits.clone(), [EMInfParams()] * 3).logits
    assert torch.equal(engine(logits, BatchParams.of([EMInfParams()] * 3)).logits, wanted)
