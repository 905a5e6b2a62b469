"""The commands, with the mock server: exit status, files, and what is printed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from loadtest.cli import main
from loadtest.storage import write_json
from tests.loadtest.example import config, many, results, scenario
from tests.loadtest.mock_server import serve, serve_app


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
        "run.jsonl",
        "stages.csv",
    ]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("[1/4] config ")
    assert printed[-1] == f"report: {out}/report.html"
    lines = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert {line["reply"] for line in lines} == {0}
    written = json.loads((out / "results.json").read_text())
    assert written["run"]["model"] == "mock"
    assert written["failed"] == []
    assert [config["accuracy"]["value"] for config in written["arms"]] == [1, 1]
    (out / "report.html").unlink()
    assert main(["report", str(out / "results.json")]) == 0
    assert (out / "report.html").exists()
    assert main(["compare", str(out / "results.json"), str(out / "results.json")]) == 0
    roi = ["roi", str(out / "results.json"), "--from", "a", "--to", "b", "--price-per-hour", "2"]
    assert main(roi) == 0
    assert main([*roi[:-1], "0"]) == 2


def test_why_replies_are_wrong_is_in_every_file(tmp_path: Path) -> None:
    row = {"prompt": "Write f.", "test_list": ["assert f(1) == 2"]}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(row) + "\n")
    task = {"type": "mbpp", "path": str(tmp_path / "mbpp.jsonl"), "unsafe": True}
    with serve(tokens=4) as served:
        path = write(tmp_path, task=task, arms={"a": {}}, repetitions=1, warmup=0)
        assert main(["run", str(path), "--base-url", served.url, "--out", str(tmp_path)]) == 0
    (line,) = (tmp_path / "requests.jsonl").read_text().splitlines()
    assert json.loads(line)["correct"] is False
    assert json.loads(line)["problem"].startswith("SyntaxError in solution.py: line 1, ")
    (stage,) = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert stage["problems"] == {"SyntaxError in solution.py": 1}
    assert '"SyntaxError in solution.py"": 1' in (tmp_path / "stages.csv").read_text()
    assert (
        "<td>SyntaxError in solution.py</td><td>a</td><td>closed 4</td><td>1</td>"
        in (tmp_path / "report.html").read_text()
    )


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
    written = json.loads((out / "results.json").read_text())
    for stage in written["stages"]:
        assert stage["ok"] + stage["incomplete"] + stage["failed"] == stage["items"] == 10
        assert sum(stage["errors"].values()) == stage["incomplete"] + stage["failed"]
    assert {kind} == {each for stage in written["stages"] for each in stage["errors"]}


def test_false_usage_is_a_warning(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for script in ({"usage_factor": 3.0}, {"usage_factor": 0.5}, {"no_usage": True}):
        with serve(tokens=8, **script) as served:
            main(["run", str(write(tmp_path)), "--base-url", served.url, "--out", str(out)])
        written = json.loads((out / "results.json").read_text())
        assert all(any("usage" in warning for warning in stage["warnings"]) for stage in written["stages"]), script


def test_wrong_input_is_one_line_and_status_2(tmp_path: Path, capsys: Any) -> None:
    scenario_file, out = str(write(tmp_path)), str(tmp_path / "o")
    Path(tmp_path, "file").touch()
    for arguments, says in {
        ("run", "none.yaml"): "none.yaml: No such file",
        ("run", scenario_file, "--base-url", "http://127.0.0.1:9"): "http://127.0.0.1:9/v1/models does not answer: ",
        ("run", scenario_file, "--base-url", "nowhere:x"): "--base-url: got 'nowhere:x'",
        ("run", scenario_file, "--api-key", "x\n"): "--api-key: has a character",
        ("run", scenario_file, "--out", str(tmp_path / "file")): "file: File exists",
        ("mock", "--script", "[" * 5000): "--script: got ",
        ("mock", "--script", '{"tokens": 0}'): "--script: tokens: got 0",
        ("mock", "--script", '{"x\\n": 0}'): "--script: x : got 0",
        ("report", "none.json"): "none.json: No such file",
        ("report", "none\0.json"): "embedded null",
    }.items():
        ending = ("--out", out) if arguments[0] == "run" and "--out" not in arguments else ()
        assert main([*arguments, *ending]) == 2, arguments
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("em-loadtest: ")
        assert says in error


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('{"data": []}', "lists no model: name the `model` in the scenario"),
        ('{"data": null}', "lists no model"),
        ("[]", "lists no model"),
        ('["a"]', "lists no model"),
        ("null", "lists no model"),
        ('{"data": {"0": 1}}', "lists no model"),
        ('{"data": [7]}', "lists no model"),
        ('{"data": [{"id": null}]}', "lists no model"),
        ("<html>", "answers with no JSON; is --base-url the address of an API?"),
        ("[" * 100_000, "answers with no JSON"),
        ("", "answers with no JSON"),
    ],
)
def test_a_list_of_models_that_is_none_is_one_line(tmp_path: Path, capsys: Any, body: str, says: str) -> None:
    assert models(tmp_path, Response(body)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "/v1/models" in error
    assert says in error


@pytest.mark.parametrize(
    ("response", "says"),
    [
        (JSONResponse({"error": {"message": "wrong key"}}, 401), "HTTP 401: wrong key"),
        (JSONResponse({"error": "not\nallowed"}, 403), "HTTP 403: not allowed"),
        (JSONResponse({"detail": "Not Found"}, 404), 'HTTP 404: {"detail":"Not Found"}'),
        (Response(b"\xff" * 300_000, 500), "HTTP 500: "),
        (RedirectResponse("https://elsewhere/v1"), "HTTP 307: moved to https://elsewhere/v1"),
    ],
)
def test_a_refusal_is_one_line_with_its_status(tmp_path: Path, capsys: Any, response: Response, says: str) -> None:
    assert models(tmp_path, response) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert says in error
    assert len(error) < 700


def models(tmp_path: Path, response: Response) -> int:
    """Run against a server with this response at /v1/models, and return the exit status."""
    app = Starlette(routes=[Route("/v1/models", lambda _: response)])
    with serve_app(app) as url:
        return main(["run", str(write(tmp_path)), "--base-url", url, "--out", str(tmp_path / "o")])


def test_what_a_server_says_about_itself_is_taken_as_far_as_it_is_as_expected(tmp_path: Path) -> None:
    """Anything that is no JSON, or not of the shape that ours has, is left out; the run goes on."""
    with serve(tokens=1) as served:
        app = served.mock.app()
        odd = [
            Route("/version", lambda _: Response("<html>")),
            Route("/metrics", lambda _: Response('vllm:generation_tokens_total{a="b"} x\n')),
            Route("/v1/em_inf", lambda _: JSONResponse(["a"])),
        ]
        app.router.routes[:0] = odd
        with serve_app(app) as url:
            out = tmp_path / "o"
            assert main(["run", str(write(tmp_path)), "--base-url", url, "--out", str(out)]) == 0
    written = json.loads((out / "results.json").read_text())
    assert written["run"]["server"] == {"models": [{"id": "mock"}]}
    assert {stage["counted_output_tokens"] for stage in written["stages"]} == {None}


def test_streams_without_done_are_a_warning(tmp_path: Path) -> None:
    async def chat(request: Request) -> Response:
        choice = {"index": 0, "delta": {"content": "4"}, "finish_reason": "stop"}
        return Response(f"data: {json.dumps({'choices': [choice]})}\n\n", media_type="text/event-stream")

    out = tmp_path / "o"
    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    with serve_app(app) as url:
        path = write(tmp_path, model="any", arms={"a": None})
        assert main(["run", str(path), "--base-url", url, "--out", str(out)]) == 0
    for stage in json.loads((out / "results.json").read_text())["stages"]:
        assert stage["ok"] == 10
        assert "complete streams without [DONE], which had a finish_reason: 10" in stage["warnings"]


@pytest.mark.filterwarnings("error")
def test_the_report_of_the_smallest_run_has_no_warnings(tmp_path: Path) -> None:
    """One question, one config, one repetition: ranges without width."""
    out = tmp_path / "o"
    with serve(tokens=1) as served:
        small = {"task": {"type": "demo", "count": 1}, "arms": {"a": None}, "repetitions": 1, "warmup": 0}
        assert main(["run", str(write(tmp_path, **small)), "--base-url", served.url, "--out", str(out)]) == 0


def test_a_report_is_written_beside_its_results_which_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    write_json(many(), path)
    before = path.read_bytes()
    assert main(["report", str(path)]) == 0
    assert sorted(one.name for one in tmp_path.iterdir()) == ["old.json", "report.html", "stages.csv"]
    assert path.read_bytes() == before


def test_names_cannot_control_the_terminal(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "results.json"
    write_json(results(config("a\x1b[2J\ud800", 5.0, 0.5)), path)
    assert main(["compare", str(path), str(path)]) == 0
    assert "a\\x1b[2J\\ud800" in capsys.readouterr().out


def test_names_may_have_letters_that_the_terminal_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(results(config("\u4e2d", 5.0, 0.5)), path)
    command = [sys.executable, "-m", "loadtest.cli", "compare", str(path), str(path)]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    assert b"\\u4e2d" in subprocess.run(command, env=ascii_only, capture_output=True, check=True).stdout


def test_a_pipe_that_is_closed_is_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(many(), path)
    command = [sys.executable, "-m", "loadtest.cli", "compare", str(path), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
