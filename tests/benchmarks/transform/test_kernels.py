"""The profile of the transform runs and writes every case; on the CPU, torch's operators are the kernels."""

import csv

import pytest

from benchmarks.transform import kernels

QUICK = ["--device", "cpu", "--rows", "2", "--vocab", "300"]


def lines_of(folder):
    with (folder / "kernels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_case_has_the_times_of_its_kernels(tmp_path):
    assert kernels.main([*QUICK, "--out", str(tmp_path)]) == 0
    lines = lines_of(tmp_path)
    assert {line["share"] for line in lines} == {"0.0", "1.0"}
    copies = [line for line in lines if line["kernel"] == "aten::copy_"]
    assert len(copies) == 2 and all(float(line["launches"]) >= 1 and float(line["call_us"]) > 0 for line in copies)
    assert "| 2 x 300 | 1 | aten::copy_ |" in (tmp_path / "kernels.md").read_text()


def test_a_case_that_fails_is_a_line_and_the_exit_status(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def broken(case, device):
        raise RuntimeError("no such | kernel")

    monkeypatch.setattr(kernels, "ours", broken)
    assert kernels.main([*QUICK, "--shares", "1", "--out", str(tmp_path)]) == 1
    assert [line["status"] for line in lines_of(tmp_path)] == ["failed: RuntimeError: no such | kernel"]
