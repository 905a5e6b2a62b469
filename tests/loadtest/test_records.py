"""A run that is killed and resumed has the records of one that was not, all but its times."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loadtest import records as records_module
from loadtest import runner
from loadtest.calibrate import Calibration
from loadtest.cli import main
from loadtest.client import Client
from loadtest.measurements import MeasuredQuestion, MeasuredRequest, Stage
from loadtest.records import REQUESTS, RUN, UNFINISHED, Existing, Records, check_resumable, describe_run, locked
from loadtest.runner import Runner
from loadtest.scenario import ScenarioError
from loadtest.stage_summary import summarize_stage
from loadtest.tasks.registry import load_task
from tests.loadtest.example import scenario
from tests.loadtest.mock_server import Served, serve, serve_app
from tests.loadtest.test_runner import NoProgress

QUESTIONS = 10  # of a stage
WARM_UP = 3
VOTES = {"arms": {"vote": {"vote": {"n": 3}}, "b": {"body": {"temperature": 0.5}}}}
POISSON = {"loads": [{"type": "poisson", "rate": 500}]}
SWEEP = {"loads": [{"type": "sweep", "most": 64}], "arms": {"a": None}, "repetitions": 1}
MATCHED = {"arms": {"a": None, "matched": {"match_entropy_of": "a"}}}


class KilledError(Exception):
    """Ends a run at the place at which a test wants it killed."""


class Dying(Records):
    """Records of a run that is killed when a question ends and `left` others had ended."""

    left = 0

    def question_ended(self, stage: Stage, question: MeasuredQuestion) -> None:
        if self.left == 0:
            raise KilledError
        self.left -= 1
        super().question_ended(stage, question)


class Counting(Client):
    """Counts what all runs send; the server would count what a killed one had sent when it gets to it."""

    sent = 0

    async def send(self, body: dict[str, Any], began: float) -> MeasuredRequest:
        Counting.sent += 1
        return await super().send(body, began)


def run(
    served: Served, folder: Path, existing: Existing = "refuse", kill_after: int | None = None, **changes: Any
) -> list[Stage]:
    """Run a scenario with its records in a folder; return its stages, none if it was killed."""
    chosen = scenario(**changes)
    task = load_task(chosen.task)
    folder.mkdir(exist_ok=True)

    async def run_all() -> list[Stage]:
        kind = Records if kill_after is None else Dying
        records = kind(folder, describe_run(chosen, "mock", task.questions), existing)
        records.left = kill_after
        async with Counting(served.url, None, chosen.limits) as client:
            return await Runner(chosen, "mock", task, client, NoProgress(), records).run()

    stages: list[Stage] = []
    try:
        stages = asyncio.run(run_all())
    except* KilledError:
        pass
    finally:
        task.close()
    return stages


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the questions of requests.jsonl without their times, those of a stage sorted; stages as they ran."""
    rows = [json.loads(line) for line in (folder / REQUESTS).read_text().splitlines()]
    for row in rows:
        del row["scheduled"], row["part"]
        for call in row["calls"]:
            del call["sent"], call["first"], call["last"], call["gaps"]
    stages = itertools.groupby(rows, lambda row: (row["arm"], row["load"], row["repetition"]))
    return [row for _, of_stage in stages for row in sorted(of_stage, key=lambda row: row["index"])]


def tear(folder: Path) -> None:
    """Append half of a line to each file, as a process does that is killed while it writes."""
    for name in (RUN, REQUESTS, UNFINISHED):
        with (folder / name).open("a") as file:
            file.write('{"arm": "a", "lo')


# ---- The same records


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # of a load that is killed
@pytest.mark.parametrize("changes", [{}, VOTES, POISSON], ids=["closed", "votes", "poisson"])
def test_a_run_killed_and_resumed_gives_the_same_records(tmp_path: Path, changes: Any) -> None:
    with serve(tokens=3, accuracy=0.6) as served:
        expected = run(served, tmp_path / "whole", **changes)
        for kill_after in (0, 1, 7, 10, 25, 39):
            folder = tmp_path / f"killed after {kill_after}"
            assert run(served, folder, kill_after=kill_after, **changes) == []
            tear(folder)
            resumed = run(served, folder, "resume", **changes)
            assert read(folder) == read(tmp_path / "whole")
            assert len(read(folder)) == 4 * QUESTIONS
            assert [(one.config, one.repetition) for one in resumed] == [
                (one.config, one.repetition) for one in expected
            ]
            assert (folder / UNFINISHED).read_bytes() == b""


def test_a_resumed_run_asks_only_what_has_no_record(tmp_path: Path) -> None:
    with serve(tokens=1) as served:
        run(served, tmp_path, kill_after=2 * QUESTIONS + 4)
        before = Counting.sent
        stages = run(served, tmp_path, "resume")
        assert Counting.sent - before == 2 * WARM_UP + 6 + QUESTIONS
        assert [one.parts for one in stages] == [1, 1, 2, 1]
        before = Counting.sent
        again = run(served, tmp_path, "resume")
        assert Counting.sent == before
    for one, other in zip(stages, again, strict=True):
        assert one.questions == other.questions
        assert summarize_stage(one, scenario()) == summarize_stage(other, scenario())


def test_a_run_killed_twice_has_three_parts_whose_seconds_add_up(tmp_path: Path) -> None:
    one_config = {"arms": {"a": None}, "repetitions": 1}
    with serve(tokens=1) as served:
        run(served, tmp_path, kill_after=3, **one_config)
        run(served, tmp_path, "resume", kill_after=3, **one_config)
        (stage,) = run(served, tmp_path, "resume", **one_config)
    parts = [[question for question in stage.questions if question.part == part] for part in (1, 2, 3)]
    assert [len(part) for part in parts] == [3, 3, 4]
    spans = [max(one.ended for one in part) - min(one.scheduled for one in part) for part in parts]
    assert stage.seconds == pytest.approx(sum(spans))
    assert stage.counted_output_tokens is None
    result = summarize_stage(stage, scenario())
    assert (result.parts, result.questions, result.accuracy) == (3, QUESTIONS, 1.0)
    assert [warning for warning in result.warnings if "3 parts" in warning]


@pytest.mark.parametrize("file", [REQUESTS, RUN, UNFINISHED])
def test_a_run_killed_while_a_stage_is_recorded_gives_the_same_records(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its questions are written, before its line in run.jsonl is, before unfinished.jsonl is emptied."""
    with serve(tokens=3) as served:
        run(served, tmp_path / "whole")
        append, killed = records_module.append, tmp_path / "killed"

        def dying_append(path: Path, *arguments: Any, **options: Any) -> None:
            if path == killed / file and file != UNFINISHED:
                raise KilledError
            append(path, *arguments, **options)

        def dying_truncate(*_: Any) -> None:
            raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(records_module, "append", dying_append)
            patch.setattr(os, "truncate", dying_truncate)
            assert run(served, killed) == []
        run(served, killed, "resume")
    assert read(killed) == read(tmp_path / "whole")


def test_a_process_that_is_killed_has_lost_nothing_that_had_ended(tmp_path: Path) -> None:
    """The server kills it when the last question but one of the second stage arrives."""
    out, path = tmp_path / "out", tmp_path / "s.yaml"
    path.write_text(json.dumps(scenario().model_dump(mode="json", by_alias=True)))
    processes: list[subprocess.Popen[bytes]] = []
    with serve(tokens=2) as served:
        run_in = ["run", str(path), "--out", str(out), "--base-url"]
        assert main([*run_in[:3], str(tmp_path / "whole"), "--base-url", served.url]) == 0

        async def deadly(request: Request) -> Response:
            if next(arrived) == 2 * WARM_UP + 2 * QUESTIONS - 1:
                processes[0].kill()
            return await served.mock.chat(request)

        app = served.mock.app()
        app.router.routes[:0] = [Route("/v1/chat/completions", deadly, methods=["POST"])]
        arrived = itertools.count(1)
        with serve_app(app) as url:
            processes.append(subprocess.Popen([sys.executable, "-m", "loadtest.cli", *run_in, url]))
            assert processes[0].wait() == -9
            assert len(read(out)) == QUESTIONS
            assert len((out / UNFINISHED).read_text().splitlines()) >= QUESTIONS - 1 - 4  # as many are in flight
        assert main([*run_in, served.url, "--resume"]) == 0
    assert read(out) == read(tmp_path / "whole")
    assert json.loads((out / RUN).read_text().splitlines()[-1]) == {"complete": True}
    assert not (out / UNFINISHED).exists()


@pytest.mark.parametrize(("how", "status"), [({"reset": 0.5}, "incomplete"), ({"refused": 0.5}, "failed")])
def test_questions_for_which_the_server_was_gone_are_asked_again(
    how: dict[str, float], status: str, tmp_path: Path
) -> None:
    """In stages that ended too: a run goes on without its server, and all that follows fails at once.

    Connections break, or a server answers with 500 because its engine has died.
    """
    with serve(tokens=3) as good:
        run(good, tmp_path / "whole")
        with serve(tokens=3, **how) as bad:
            stages = run(bad, tmp_path / "bad")
            assert {question.status for one in stages for question in one.questions} == {"ok", status}
            run(good, tmp_path / "bad", "resume", kill_after=1)
        resumed = run(good, tmp_path / "bad", "resume")
    assert {question.status for one in resumed for question in one.questions} == {"ok"}
    assert read(tmp_path / "bad") == read(tmp_path / "whole")


def test_a_question_that_the_server_refused_is_not_asked_again(tmp_path: Path) -> None:
    with serve(refused=0.5, status=429) as served:
        run(served, tmp_path)
        before = Counting.sent
        run(served, tmp_path, "resume")
        assert Counting.sent == before


def test_a_resumed_sweep_is_decided_by_its_recorded_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {1: 10.0, 2: 20.0, 4: 40.0, 8: 41.0, 16: 99.0}  # the fourth is the last: its gain is below 5 %
    monkeypatch.setattr(runner, "answers_per_second", lambda stage: rates[stage.target_load])
    with serve(tokens=1) as served:
        run(served, tmp_path, kill_after=2 * QUESTIONS + 5, **SWEEP)
        before = Counting.sent
        stages = run(served, tmp_path, "resume", **SWEEP)
        assert Counting.sent - before == 2 * WARM_UP + 5 + QUESTIONS
    assert [stage.target_load for stage in stages] == [1, 2, 4, 8]
    assert [stage.parts for stage in stages] == [1, 1, 2, 1]


def test_a_matched_temperature_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []

    async def find(*arguments: Any, **_: Any) -> Calibration:
        searches.append(arguments)
        return Calibration(temperature=0.7, entropy=1.0, target=1.01)

    monkeypatch.setattr(runner, "find_temperature", find)
    with serve(tokens=1) as served:
        run(served, tmp_path, kill_after=0, **MATCHED)
        stages = run(served, tmp_path, "resume", **MATCHED)
        assert len(stages) == 4
        assert len(searches) == 1
        assert {body.get("temperature") for body in served.mock.bodies} == {None, 0.7}


def test_a_stage_read_back_has_the_p99_of_its_scheduling_delays(tmp_path: Path) -> None:
    stage = Stage("a", "closed 4", 4.0, False, 0, scheduling_delays=[(i * 37 % 1001) / 7 for i in range(1001)])
    stage.questions = [MeasuredQuestion(0, 0.0, [MeasuredRequest(seed=1, last=1.0)])]
    about = describe_run(scenario(), "mock", [])
    Records(tmp_path, about, "refuse").stage_ended(stage)
    back = Stage("a", "closed 4", 4.0, False, 0)
    assert Records(tmp_path, about, "resume").recall(back)
    before, after = (summarize_stage(one, scenario()).scheduling_delay_p99 for one in (stage, back))
    assert after == pytest.approx(before) and before == pytest.approx(990 / 7)


# ---- What is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 7}, "scenario.seed: got 7; the records have 0"),
        ({"request": {"max_tokens": 9}}, "scenario.request.max_tokens: got 9; the records have None"),
        ({"arms": {"a": None, "b": {"body": {"temperature": 0.6}}}}, "scenario.arms.b.body.temperature: got 0.6; "),
        ({"arms": {"b": {"body": {"temperature": 0.5}}}}, "scenario.arms.a: got None; "),
        ({"task": {"type": "demo", "count": 9}}, "scenario.task.count: got 9; the records have 10"),
        ({"repetitions": 3}, "scenario.repetitions: got 3; the records have 2"),
    ],
)
def test_another_scenario_is_refused_with_the_first_field_that_differs(tmp_path: Path, changes: Any, says: str) -> None:
    with serve(tokens=1) as served:
        run(served, tmp_path, kill_after=3)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ScenarioError) as error:
            run(served, tmp_path, "resume", **changes)
    assert says in str(error.value) and "--restart" in str(error.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_run_that_ended_can_be_given_more_arms(tmp_path: Path) -> None:
    more = {"arms": {"c": None, "a": None, "b": {"body": {"temperature": 0.5}}}, "references": ["b"]}
    with serve(tokens=1, accuracy=0.6) as served:
        run(served, tmp_path / "first")
        before = Counting.sent
        stages = run(served, tmp_path / "first", "resume", **more)
        assert Counting.sent - before == 2 * (WARM_UP + QUESTIONS)
        run(served, tmp_path / "whole", **more)
    assert [stage.config for stage in stages].count("c") == 2
    ordered = [sorted(read(tmp_path / name), key=repr) for name in ("first", "whole")]
    assert ordered[0] == ordered[1]


def test_another_model_and_other_questions_in_the_same_file_are_refused(tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    out.mkdir()
    chosen = scenario(task={"type": "file", "path": str(data)})

    def described(answer: int, model: str) -> dict[str, Any]:
        data.write_text(json.dumps({"question": "1 + 1?", "answer": answer}))
        return describe_run(chosen, model, load_task(chosen.task).questions)

    Records(out, described(2, "m"), "refuse")
    Records(out, described(2, "m"), "resume")
    with pytest.raises(ScenarioError, match="model: got 'other'; the records have 'm'"):
        Records(out, described(2, "other"), "resume")
    with pytest.raises(ScenarioError, match="questions_sha256: got "):
        Records(out, described(3, "m"), "resume")


def test_records_of_a_version_whose_scenario_had_fewer_fields_can_be_resumed(tmp_path: Path) -> None:
    with serve(tokens=1) as served:
        run(served, tmp_path, kill_after=QUESTIONS + 3)
        path = tmp_path / RUN
        first, *others = path.read_text().splitlines()
        row = json.loads(first)
        del row["about"]["scenario"]["price_per_hour"], row["about"]["scenario"]["stream"]
        path.write_text("\n".join([json.dumps(row), *others]) + "\n")
        assert len(run(served, tmp_path, "resume")) == 4


def test_loads_that_have_the_same_label_cannot_be_resumed() -> None:
    check_resumable(scenario(loads=[{"type": "closed", "concurrency": 3}, {"type": "sweep", "most": 4}]))
    with pytest.raises(ScenarioError, match="loads: closed 4 is there 2 times"):
        check_resumable(scenario(loads=[{"type": "closed", "concurrency": 4}, {"type": "sweep", "most": 4}]))


@pytest.mark.parametrize("name", [RUN, REQUESTS, UNFINISHED])
@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"arm": "a", "load": "closed 4", "repetition": 0, "calls": 5}'])
def test_a_damaged_line_is_an_error_with_its_file_and_line(tmp_path: Path, name: str, line: str) -> None:
    with serve(tokens=1) as served:
        run(served, tmp_path, kill_after=QUESTIONS + 3)
        path = tmp_path / name
        first, *others = path.read_text().splitlines()
        path.write_text("\n".join([first, line, *others]) + "\n")
        with pytest.raises(ScenarioError) as error:
            run(served, tmp_path, "resume")
    assert str(error.value).startswith(f"{path}: line 2: ")
    assert "\n" not in str(error.value)


def test_missing_questions_of_a_stage_that_ended_are_an_error(tmp_path: Path) -> None:
    with serve(tokens=1) as served:
        run(served, tmp_path, kill_after=QUESTIONS + 3)
        path = tmp_path / REQUESTS
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        with pytest.raises(ScenarioError, match=r"requests.jsonl: has 9 questions of . / closed 4 / 0, run.jsonl says"):
            run(served, tmp_path, "resume")


def test_records_of_an_unfinished_run_are_not_overwritten_unless_asked_to(tmp_path: Path, capsys: Any) -> None:
    path, out = tmp_path / "s.yaml", tmp_path / "s"
    path.write_text(json.dumps(scenario().model_dump(mode="json", by_alias=True)))
    with serve(tokens=1) as served:
        command = ["run", str(path), "--out", str(out), "--base-url", served.url]
        run(served, out, kill_after=3)
        assert main(command) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert "--resume" in error and "--restart" in error
        assert main([*command, "--restart"]) == 0
        assert main(command) == 0  # a run that ended is replaced
        assert main([*command, "--resume"]) == 0
    assert len(read(out)) == 4 * QUESTIONS


def test_two_runs_cannot_write_to_the_same_folder(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(scenario().model_dump(mode="json", by_alias=True)))
    with locked(tmp_path):
        assert main(["run", str(path), "--out", str(tmp_path), "--resume"]) == 2
        assert "another em-loadtest writes its records there" in capsys.readouterr().err
    with locked(tmp_path):
        assert [one.name for one in tmp_path.iterdir()] == ["s.yaml"]


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(scenario().model_dump(mode="json", by_alias=True)))
    monkeypatch.setattr(Records, "stage_ended", interrupted)
    with serve(tokens=1) as served:
        assert main(["run", str(path), "--out", str(tmp_path), "--base-url", served.url]) == 130
    assert "--resume" in capsys.readouterr().err


def test_a_run_whose_server_was_gone_is_unfinished(tmp_path: Path, capsys: Any) -> None:
    path, out = tmp_path / "s.yaml", tmp_path / "s"
    path.write_text(json.dumps(scenario(model="mock").model_dump(mode="json", by_alias=True)))
    with serve(tokens=3) as good, serve(tokens=3, reset=0.5) as bad:
        command = ["run", str(path), "--out", str(out), "--base-url"]
        assert main([*command, bad.url]) == 1
        assert "--resume asks the questions again" in capsys.readouterr().err
        assert main([*command, good.url]) == 2
        assert main([*command, good.url, "--resume"]) == 0
        assert main([*command, good.url]) == 0
