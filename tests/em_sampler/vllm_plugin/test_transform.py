"""Which transform a worker builds: what the operator asked for, and what the log says."""

import logging

import pytest
import torch
from vllm.v1.serial_utils import run_method
from vllm.v1.worker.worker_base import WorkerBase

from em_sampler.transforms import dispatch
from em_sampler.transforms.eager import EagerTransform
from em_sampler.vllm_plugin.transform import REQUIRE_FUSED_ENV, TRANSFORM_RPC, build_transform
from tests.em_sampler.vllm_plugin.support import parallel_config

CPU = torch.device("cpu")


def test_the_log_names_the_transform(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO):
        assert build_transform(parallel_config(), 50, CPU, 4).name == "numba_cpu"
    assert "em_inf: transform numba_cpu on cpu" in caplog.messages


def test_a_fallback_is_an_error_only_if_the_operator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*sizes: object) -> None:
        raise OSError("no compiler")

    monkeypatch.setitem(dispatch._BUILDERS, "cpu", fail)
    assert build_transform(parallel_config(), 50, CPU, 4).name == "eager"
    monkeypatch.setenv(REQUIRE_FUSED_ENV, "1")
    with pytest.raises(RuntimeError, match="OSError: no compiler"):
        build_transform(parallel_config(), 50, CPU, 4)


def test_only_the_last_pipeline_stage_builds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setitem(dispatch._BUILDERS, "cpu", lambda *sizes: built.append(sizes) or EagerTransform(*sizes))
    worker = object.__new__(WorkerBase)
    answers = []
    for rank in range(6):
        build_transform(parallel_config(rank, tensor_parallel_size=2, pipeline_parallel_size=3), 50, CPU, 4)
        answers.append(run_method(worker, TRANSFORM_RPC, (), {}))  # as vLLM calls it
    assert built == [(50, CPU, 4)] * 2
    assert answers == [None] * 4 + [{"transform": "eager", "device": "cpu"}] * 2
