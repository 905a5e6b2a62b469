"""The benchmark of the transform runs, and writes what it measures. No assertion is about time."""

import csv
import math

import pytest
import torch

from benchmarks.transform.__main__ import main
from benchmarks.transform.implementations import IMPLEMENTATIONS

QUICK = ["--quick", "--device", "cpu", "--vocab", "300", "--threads", str(torch.get_num_threads())]


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


def test_an_implementation_that_fails_is_a_line_and_the_exit_status(tmp_path, monkeypatch):
    def broken(case, device):
        raise RuntimeError("no such kernel\nat all")

    monkeypatch.setitem(IMPLEMENTATIONS, "ours", broken)
    assert main([*QUICK, "--arms", "ours,eager", "--rows", "1", "--out", str(tmp_path)]) == 1
    with (tmp_path / "transform.csv").open(newline="") as file:
        states = {line["arm"]: line["status"] for line in csv.DictReader(file)}
    assert states == {"ours": "failed: RuntimeError: no such kernel", "eager": "ok"}


def test_a_run_that_is_interrupted_leaves_what_it_measured(tmp_path, monkeypatch):
    def interrupted(case, device):
        raise KeyboardInterrupt

    monkeypatch.setitem(IMPLEMENTATIONS, "released", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([*QUICK, "--arms", "eager,released", "--rows", "1", "--out", str(tmp_path)])
    with (tmp_path / "transform.csv").open(newline="") as file:
        assert [(line["arm"], line["status"]) for line in csv.DictReader(file)] == [("eager", "ok")]
