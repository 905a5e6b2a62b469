"""Which transform a worker builds: what the operator asked for, and what the log says."""

import logging

import pytest
import torch

from em_sampler.transforms import dispatch
from em_sampler.vllm_plugin.transform import REQUIRE_FUSED_ENV, build_transform

CPU = torch.device("cpu")


def test_the_log_names_the_transform(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO):
        assert build_transform(50, CPU, 4).name == "numba_cpu"
    assert "em_inf: transform numba_cpu on cpu" in caplog.messages


def test_a_fallback_is_an_error_only_if_the_operator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*sizes: object) -> None:
        raise OSError("no compiler")

    monkeypatch.setitem(dispatch._BUILDERS, "cpu", fail)
    assert build_transform(50, CPU, 4).name == "eager"
    monkeypatch.setenv(REQUIRE_FUSED_ENV, "1")
    with pytest.raises(RuntimeError, match="OSError: no compiler"):
        build_transform(50, CPU, 4)
