"""Which implementation runs where, and that its failure is said aloud."""

import logging

import pytest
import torch

from em_sampler import EMInfParams, backends, transform
from em_sampler.backends import fastest_transform
from em_sampler.cpu_counted import CountedTransform
from em_sampler.rows import RowParams
from em_sampler.torch_batched import BatchedTransform

CPU = torch.device("cpu")


def test_the_cpu_counts() -> None:
    assert isinstance(fastest_transform(50, CPU, 4), CountedTransform)


def test_a_device_without_one_of_its_own_has_the_reference() -> None:
    assert isinstance(fastest_transform(50, torch.device("meta"), 4), BatchedTransform)


def test_what_does_not_work_is_replaced_with_one_loud_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> CountedTransform:
        raise OSError("no compiler")

    monkeypatch.setitem(backends._ON, "cpu", broken)
    with caplog.at_level(logging.WARNING):
        engine = fastest_transform(50, CPU, 4)
    assert isinstance(engine, BatchedTransform)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "OSError: no compiler" in caplog.text
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    wanted = transform(logits.clone(), [EMInfParams()] * 3).logits
    assert torch.equal(engine(logits, RowParams.of([EMInfParams()] * 3)).logits, wanted)
