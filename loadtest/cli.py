"""`em-loadtest`: run a scenario, compare two runs, tell what a switch saves, serve a mock.

Exit status: 0 as it should be, 1 a run with too many errors or a regression, 2 something wrong with what was asked.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from loadtest import mock, provenance
from loadtest.client import Client
from loadtest.compare import compare
from loadtest.live import Lines, LiveTable
from loadtest.records import Item, Stage
from loadtest.report import read_json, write_csv, write_html, write_json
from loadtest.results import Results, Run
from loadtest.roi import roi
from loadtest.runner import Runner
from loadtest.scenario import Scenario, ScenarioError, Sweep, load
from loadtest.summary import summarize, summarize_stage
from loadtest.tasks import load_task

JSONL, JSON, CSV, HTML = "requests.jsonl", "results.json", "stages.csv", "report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ScenarioError, ValueError) as error:
        print(f"em-loadtest: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"em-loadtest: interrupted; {JSONL} has the stages that had ended", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="em-loadtest", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    run = commands.add_parser("run", help="run a scenario against a server")
    run.add_argument("scenario", type=Path)
    run.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    run.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY")
    run.add_argument("--out", type=Path, help="folder for the results; default: build/loadtest/NAME")
    run.add_argument("--server-flags", help="how the server was started, for the record")
    run.set_defaults(run=_run)
    report = commands.add_parser("report", help=f"make {HTML} and {CSV} again from {JSON}")
    report.add_argument("results", type=Path)
    report.set_defaults(run=_report)
    against = commands.add_parser("compare", help="two results.json; status 1 if the second is worse")
    against.add_argument("before", type=Path)
    against.add_argument("after", type=Path)
    against.add_argument("--tolerance", type=float, default=0.05, help="share that may be lost; default: 0.05")
    against.set_defaults(run=_compare)
    saving = commands.add_parser("roi", help="what moving a workload from one arm to another saves")
    saving.add_argument("results", type=Path)
    saving.add_argument("--from", dest="frm", required=True, metavar="ARM")
    saving.add_argument("--to", required=True, metavar="ARM")
    saving.add_argument("--load", help="its label in the report; default: the only one, or the fastest")
    saving.add_argument("--price-per-hour", type=float, required=True, help="of the machine that serves")
    saving.add_argument("--answers-per-day", type=float)
    saving.set_defaults(run=_roi)
    fake = commands.add_parser("mock", help="serve a scripted server without a model")
    fake.add_argument("--host", default="127.0.0.1")
    fake.add_argument("--port", type=int, default=8000)
    fake.add_argument("--script", type=json.loads, default={}, help='such as \'{"tokens": 50, "reset": 0.1}\'')
    fake.set_defaults(run=_mock)
    return parser


def _run(options: argparse.Namespace) -> int:
    scenario = load(options.scenario)
    folder = options.out or Path("build/loadtest", scenario.name)
    folder.mkdir(parents=True, exist_ok=True)
    with Recorder(folder / JSONL) as recorder:
        results = asyncio.run(_results(scenario, options, recorder))
    _write(results, folder)
    print(f"report: {folder / HTML}")
    for problem in results.failed:
        print(f"em-loadtest: {problem}", file=sys.stderr)
    return 1 if results.failed else 0


class Recorder:
    """requests.jsonl: a line for each question, written as soon as its stage has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: TextIO

    def __enter__(self) -> "Recorder":
        self.file = self.path.open("w")
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def record(self, stage: Stage) -> None:
        """All of its questions."""
        where = {"arm": stage.arm, "load": stage.load, "repetition": stage.repetition}
        self.file.writelines(json.dumps(where | line_of(item)) + "\n" for item in stage.items)
        self.file.flush()


def line_of(item: Item) -> dict[str, Any]:
    """An item for requests.jsonl; `reply` is the position of the call that became the reply."""
    line = asdict(item)
    line["reply"] = item.calls.index(item.reply) if item.reply else None
    for call in line["calls"]:
        del call["top_logprobs"]
    return line


async def _results(scenario: Scenario, options: argparse.Namespace, recorder: Recorder) -> Results:
    began = time.monotonic(), datetime.now(UTC)
    task = load_task(scenario.task)
    show = (LiveTable if sys.stdout.isatty() else Lines)(
        lambda stage: summarize_stage(stage, scenario), _count(scenario), sys.stdout
    )
    try:
        async with Client(options.base_url, options.api_key, scenario.limits) as client:
            model = scenario.model or await _first_model(client)
            server = await provenance.server(client, options.server_flags)
            runner = Runner(scenario, model, task, client, show, recorder.record)
            with show if isinstance(show, LiveTable) else nullcontext():
                stages = await runner.run()
    finally:
        task.close()
    stage_results, arms, comparisons, failed = summarize(stages, scenario)
    run = Run(
        started=began[1].isoformat(timespec="seconds"),
        seconds=time.monotonic() - began[0],
        base_url=options.base_url,
        model=model,
        machine=provenance.machine(),
        versions=provenance.versions(),
        git_commit=provenance.git_commit(),
        server=server,
    )
    return Results(
        name=scenario.name,
        run=run,
        scenario=scenario.model_dump(mode="json"),
        calibration={name: found.summary() for name, found in runner.calibration.items()},
        stages=stage_results,
        arms=arms,
        comparisons=comparisons,
        failed=failed,
    )


def _count(scenario: Scenario) -> int | None:
    """Stages that there will be; None where a sweep decides."""
    if any(isinstance(each, Sweep) for each in scenario.loads):
        return None
    return len(scenario.loads) * len(scenario.arms) * scenario.repetitions


async def _first_model(client: Client) -> str:
    response = await client.get("/v1/models")
    if response is None:
        raise ScenarioError(f"{client.root}/models does not answer: is a server there, and is the API key right?")
    name: str = response.json()["data"][0]["id"]
    return name


def _write(results: Results, folder: Path) -> None:
    write_json(results, folder / JSON)
    write_csv(results, folder / CSV)
    write_html(results, folder / HTML)


def _report(options: argparse.Namespace) -> int:
    _write(read_json(options.results), options.results.parent)
    return 0


def _compare(options: argparse.Namespace) -> int:
    lines, regressed = compare(read_json(options.before), read_json(options.after), options.tolerance)
    print("\n".join(lines))
    return 1 if regressed else 0


def _roi(options: argparse.Namespace) -> int:
    results = read_json(options.results)
    print(
        "\n".join(roi(results, options.frm, options.to, options.load, options.price_per_hour, options.answers_per_day))
    )
    return 0


def _mock(options: argparse.Namespace) -> int:
    mock.serve(mock.Script.model_validate(options.script), options.host, options.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
