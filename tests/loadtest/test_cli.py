"""The commands, with the mock server: exit status, files, and what is printed."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest.cli import main
from tests.loadtest.example import scenario
from tests.loadtest.mock_server import serve


def write(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(scenario(**changes).model_dump(mode="json", by_alias=True)))
    return path


def test_a_run_writes_its_files_and_the_other_commands_read_them(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    with serve(tokens=4) as served:
        assert main(["run", str(write(tmp_path)), "--base-url", served.url, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
        "requests.jsonl",
        "results.json",
        "stages.csv",
    ]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("[1/4] config ")
    assert printed[-1] == f"report: {out}/report.html"
    lines = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert {line["reply"] for line in lines} == {0}
    results = json.loads((out / "results.json").read_text())
    assert results["run"]["model"] == "mock"
    assert results["failed"] == []
    assert [config["accuracy"]["value"] for config in results["arms"]] == [1, 1]
    (out / "report.html").unlink()
    assert main(["report", str(out / "results.json")]) == 0
    assert (out / "report.html").exists()
    assert main(["compare", str(out / "results.json"), str(out / "results.json")]) == 0
    roi = ["roi", str(out / "results.json"), "--from", "a", "--to", "b", "--price-per-hour", "2"]
    assert main(roi) == 0
    assert main([*roi[:-1], "0"]) == 2


@pytest.mark.parametrize(
    ("script", "changes", "kind"),
    [
        ({"refused": 0.5}, {}, "HTTP 500"),
        ({"reset": 0.5}, {}, "connection"),
        (
            {"stalled": 0.5},
            {
                "limits": {"stall_s": 3, "lag_ms": 1e6},  # 3 s are enough for a reply's first byte on a slow machine
                "loads": [{"type": "closed", "concurrency": 10}],  # all questions stall at the same time
                "warmup": 0,
            },
            "stalled",
        ),
    ],
)
def test_errors_of_the_server_fail_the_run_and_are_counted(
    tmp_path: Path, capsys: Any, script: Any, changes: Any, kind: str
) -> None:
    out = tmp_path / "out"
    with serve(tokens=4, **script) as served:
        path = write(tmp_path, arms={"a": None}, **changes)
        assert main(["run", str(path), "--base-url", served.url, "--out", str(out)]) == 1
    assert "of 10 questions were not answered" in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    for stage in results["stages"]:
        assert stage["ok"] + stage["incomplete"] + stage["failed"] == stage["items"] == 10
        assert sum(stage["errors"].values()) == stage["incomplete"] + stage["failed"]
    assert {kind} == {each for stage in results["stages"] for each in stage["errors"]}


def test_false_usage_is_a_warning(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for script in ({"usage_factor": 3.0}, {"usage_factor": 0.5}, {"no_usage": True}):
        with serve(tokens=8, **script) as served:
            main(["run", str(write(tmp_path)), "--base-url", served.url, "--out", str(out)])
        results = json.loads((out / "results.json").read_text())
        assert all(any("usage" in warning for warning in stage["warnings"]) for stage in results["stages"]), script


def test_wrong_input_is_one_line_and_status_2(tmp_path: Path, capsys: Any) -> None:
    assert main(["run", str(tmp_path / "none.yaml")]) == 2
    assert main(["run", str(write(tmp_path)), "--base-url", "http://127.0.0.1:9", "--out", str(tmp_path / "o")]) == 2
    assert main(["run", str(write(tmp_path)), "--base-url", "nowhere:x", "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 3
    assert "http://127.0.0.1:9/v1/models does not answer" in error[1]
