"""Whatever a file or a server contains, the tool has a result or an error of its own: never another exception."""

import copy
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from loadtest.cli import main
from loadtest.measurements import MeasuredQuestion, MeasuredRequest, Stage
from loadtest.record_lines import json_line, line_of, question_of
from loadtest.replies import StreamedReply, read_reply, set_status
from loadtest.scenario import Scenario, ScenarioError, load
from loadtest.stage_summary import summarize_stage
from loadtest.storage import write_json
from loadtest.tasks.generated import synthetic_questions
from tests.loadtest.example import config, results, scenario
from tests.loadtest.tasks.loading import loaded

BOUNDED = settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
ODD_NUMBERS = (0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 5e-324, 1e-300, 1e300, math.inf, -math.inf, math.nan, True)
SCALARS = st.one_of(
    st.none(),
    st.sampled_from(ODD_NUMBERS),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from(["", "\0", "\x1b[2J", "\ud800", "../x", "$x_1$", "<b>", "nan", "1e999", "a" * 5000]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all parts of a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(one for key, part in inside for one in places(part, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, whole: Any) -> Any:
    """Draw a value of which one to three parts are replaced or removed."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([path for path in places(value) if path] or [(None,)]))
        if last is None:
            return draw(VALUES)
        part = value
        for key in path:
            part = part[key]
        if draw(st.booleans()) and isinstance(part, dict):
            del part[last]
        else:
            part[last] = draw(VALUES)
    return value


# ---- A scenario


SCENARIO: dict[str, Any] = {
    "name": "s",
    "task": {
        "type": "synthetic",
        "prompt_tokens": {"mean": 9, "spread": 2.0},
        "output_tokens": {"mean": 5},
        "count": 3,
    },
    "request": {"temperature": 1, "max_tokens": 9},
    "arms": {"a": None, "b": {"body": {"top_p": 0.5}, "vote": {"n": 3}}, "c": {"match_entropy_of": "b"}},
    "references": ["a"],
    "loads": [{"type": "closed", "concurrency": 2}, {"type": "poisson", "rate": 2}, {"type": "sweep", "most": 8}],
    "repetitions": 2,
    "slo": {"e2e_ms": 100},
    "limits": {"stall_s": 3},
    "price_per_hour": 2.5,
}


def read_scenario(path: Path) -> None:
    """Read a scenario; one that is valid has what a run needs, without another exception."""
    try:
        read: Scenario = load(path)
        read.check_seeds(100)
        if read.task.type == "synthetic" and read.task.count < 100:
            list(synthetic_questions(read.task.model_copy(update={"word": "w"})))
    except ScenarioError:
        return
    json.dumps(read.model_dump(mode="json", by_alias=True), allow_nan=False).encode()
    assert len(Path("x", read.name).parts) == 2
    for one in read.loads:
        assert one.type != "sweep" or list(one.levels())


@given(changed(SCENARIO), st.booleans())
@BOUNDED
def test_scenarios_with_anything_in_them(tmp_path: Path, content: Any, as_json: bool) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(content) if as_json else yaml.safe_dump(content), "utf-8", "surrogatepass")
    read_scenario(path)


@given(st.one_of(st.binary(), st.text(alphabet="ab:-[]{}&*!<>|'\"%@?,#\\ \n\t01.~=").map(str.encode)))
@example(b"a: &a\n  <<: *a")
@example(b"<<: 7")
@example(b"? !!set {a}\n: 1")
@example(b"a: !!binary x")
@example(b"a: !!omap [b]")
@example(b"a: !!int ''")
@example(b"%YAML 9.9\n---\na")
@BOUNDED
def test_scenarios_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(content)
    read_scenario(path)


# ---- Results


def stored(tmp_path: Path) -> Any:
    path = tmp_path / "good.json"
    one, other = config("a", 5.0, 0.5, entropies=[0.1, 0.9]), config("b", 9.0, 0.6)
    write_json(results(one, other, calibration={"b": {"temperature": 0.5}}), path)
    return json.loads(path.read_text())


@pytest.mark.parametrize("command", ["report", "compare", "roi"])
@given(data=st.data())
@settings(BOUNDED, max_examples=40)
def test_results_with_anything_in_them(tmp_path: Path, command: str, data: st.DataObject) -> None:
    content = data.draw(changed(stored(tmp_path)))
    check_command(tmp_path, command, json.dumps(content).encode())


@pytest.mark.parametrize("command", ["report", "compare", "roi"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b'{"schema_version": ' + b"[" * 70 + b"]" * 70 + b"}",
        b'{"schema_version": ' + b"9" * 5000 + b"}",
        b'{"schema_version": 1}',
        b'{"schema_version": 1, "results": [{"a": 1}]}',
        b"NaN",
        b"\0",
    ],
)
def test_results_that_are_none(tmp_path: Path, capsys: Any, command: str, content: bytes) -> None:
    assert check_command(tmp_path, command, content) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "hostile.json: " in error
    assert len(error) < 700


def check_command(tmp_path: Path, command: str, content: bytes) -> int:
    """Run a command on results with this content; if it refuses them it writes nothing."""
    folder = tmp_path / "hostile"
    folder.mkdir(exist_ok=True)
    for left in folder.iterdir():
        left.unlink()
    path = folder / "hostile.json"
    path.write_bytes(content)
    roi = ("--from", "a", "--to", "b", "--price-per-hour", "2", "--answers-per-day", "1000")
    status = main([command, str(path), *{"report": (), "compare": (str(path),), "roi": roi}[command]])
    written = sorted(one.name for one in folder.iterdir() if one != path)
    assert written == (["report.html", "stages.csv"] if command == "report" and status == 0 else [])
    assert status in (0, 1, 2)
    return status


# ---- Questions


@given(changed([{"question": "1+1", "answer": "2"}, {"question": "2+2", "answer": ["4", "5"]}]), st.booleans())
@BOUNDED
def test_questions_with_anything_in_them(tmp_path: Path, content: Any, lines: bool) -> None:
    rows = content if lines and isinstance(content, list) else [content]
    check_questions(tmp_path, "\n".join(map(json.dumps, rows)).encode())


@given(st.one_of(st.binary(), st.text(alphabet='[]{}",:\n\\u08 ').map(str.encode)))
@example(b'[{"question": ' + b"9" * 5000 + b', "answer": 1}]')
@example(b"[" * 100_000)
@BOUNDED
def test_questions_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    check_questions(tmp_path, content)


def check_questions(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content)
    for checker in ("exact", "number"):
        with suppress(ScenarioError), loaded(type="file", path=path, checker=checker) as task:
            assert all(question.text.encode() and question.answer for question in task.questions)


# ---- Replies


CHUNK = {
    "choices": [{"index": 0, "delta": {"content": "4"}, "finish_reason": None}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    "em_inf": [{"tokens": 2, "missing": 0, "optimized_tokens": 1, "entropy_before": 0.5, "entropy_after": 0.1}],
    "strategy": {"type": "self_consistency", "votes": {"4": 2}},
}
REPLY = {
    "choices": [
        {
            "message": {"content": "4"},
            "finish_reason": "stop",
            "logprobs": {"content": [{"top_logprobs": [{"logprob": -0.5}]}]},
        }
    ]
} | {name: CHUNK[name] for name in ("usage", "em_inf", "strategy")}
EVENTS = st.one_of(
    st.binary(max_size=40),
    changed(CHUNK).map(lambda value: f"data: {json.dumps(value)}\n\n".encode()),
    st.sampled_from(
        [b"data: [DONE]\n\n", b"event: error\r\n", b":\n", b"\r\n\r\n", b"data: [" + b"[" * 5000, b"\xef\xbb\xbf"]
    ),
)


@given(st.lists(EVENTS, max_size=6), st.integers(1, 200))
@BOUNDED
def test_streams_with_anything_in_them(events: list[bytes], size: int) -> None:
    measured = MeasuredRequest(seed=0)
    reply = StreamedReply(measured)
    stream = b"".join(events)
    try:
        for start in range(0, len(stream), size):
            reply.receive(stream[start : start + size], float(start))
        reply.end(1e6)
    except ValueError as error:
        measured.error = f"unreadable: {error}"
    check_measured(measured)


@given(changed(REPLY).map(lambda value: json.dumps(value).encode()) | st.binary())
@BOUNDED
def test_whole_replies_with_anything_in_them(body: bytes) -> None:
    measured = MeasuredRequest(seed=0)
    try:
        read_reply(body, measured)
    except ValueError as error:
        measured.error = f"unreadable: {error}"
    check_measured(measured)


def check_measured(measured: MeasuredRequest) -> None:
    """Whatever was read can be written, read back and summed up."""
    measured.last = 1.0
    set_status(measured)
    question = MeasuredQuestion(0, 0.0, [measured], reply=measured if measured.status == "ok" else None)
    line = json_line(line_of(question))
    assert json_line(line_of(question_of(json.loads(line, parse_constant=pytest.fail)))) == line
    summarize_stage(Stage("a", "closed 1", 1.0, False, 0, [question], seconds=1e-3), scenario())
