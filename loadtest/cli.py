"""`em-loadtest`: run a scenario, compare two runs, compute what a switch saves, serve a mock.

Exit status: 0 success, 1 a run with too many errors or a regression, 2 wrong input.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from pydantic import ValidationError

from loadtest import environment, mock
from loadtest.client import Client
from loadtest.compare import compare
from loadtest.inputs import one_line, parse_json, printable, shortened
from loadtest.progress import ProgressLines, ProgressTable
from loadtest.records import GONE, Records, check_resumable, describe_run, locked
from loadtest.report import write_html
from loadtest.results import Results, Run
from loadtest.runner import Runner
from loadtest.savings import savings
from loadtest.scenario import Scenario, ScenarioError, first_problem, load
from loadtest.stage_summary import summarize_stage
from loadtest.storage import read_json, write_csv, write_json
from loadtest.summary import summarize
from loadtest.tasks.registry import load_task
from loadtest.time_left import TimeLeft

JSON, CSV, HTML = "results.json", "stages.csv", "report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, TextIOWrapper):  # names may have letters that a terminal does not have
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
        return 1
    except ValidationError as error:
        return _wrong(first_problem(error))
    except OSError as error:
        return _wrong(f"{error.filename or 'output'}: {error.strerror or error}")
    except ValueError as error:
        return _wrong(error)
    except KeyboardInterrupt:
        hint = "; the same command with --resume goes on from here" if options.run is _run else ""
        print(f"em-loadtest: interrupted{hint}", file=sys.stderr)
        return 130
    return status


def _wrong(problem: object) -> int:
    print(f"em-loadtest: {one_line(problem)}", file=sys.stderr)
    return 2


# ---- Flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="em-loadtest", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_run(commands.add_parser("run", help="run a scenario against a server"))
    report = commands.add_parser("report", help=f"write {HTML} and {CSV} again from {JSON}")
    report.add_argument("results", type=Path)
    report.set_defaults(run=_report)
    comparison = commands.add_parser("compare", help="compare two results.json; exit status 1 if the second is worse")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    comparison.add_argument("--tolerance", type=float, default=0.05, help="share that may be lost; default: 0.05")
    comparison.set_defaults(run=_compare)
    _add_roi(commands.add_parser("roi", help="compute what moving a workload from one config to another saves"))
    mock_server = commands.add_parser("mock", help="serve a scripted server without a model")
    mock_server.add_argument("--host", default="127.0.0.1")
    mock_server.add_argument("--port", type=int, default=8000)
    mock_server.add_argument("--script", default="{}", help='for example \'{"tokens": 50, "reset": 0.1}\'')
    mock_server.set_defaults(run=_mock)
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    run.add_argument("scenario", type=Path)
    run.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    run.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY")
    run.add_argument("--out", type=Path, help="folder for the results; default: build/loadtest/NAME")
    run.add_argument("--server-flags", help="how the server was started, to be noted in the results")
    existing = run.add_mutually_exclusive_group()
    for name, says in (
        ("resume", "go on with the run whose records are in the folder, and ask again what a lost server left out"),
        ("restart", "begin anew, even if the folder has the records of an unfinished run"),
    ):
        existing.add_argument(f"--{name}", dest="existing", action="store_const", const=name, help=says)
    run.set_defaults(run=_run, existing="refuse")


def _add_roi(roi: argparse.ArgumentParser) -> None:
    roi.add_argument("results", type=Path)
    roi.add_argument("--from", dest="old", required=True, metavar="CONFIG")
    roi.add_argument("--to", dest="new", required=True, metavar="CONFIG")
    roi.add_argument("--load", help="its label in the report; default: the load at which --from answers most")
    roi.add_argument("--price-per-hour", type=float, required=True, help="price of the machine that serves")
    roi.add_argument("--answers-per-day", type=float)
    roi.set_defaults(run=_roi)


# ---- Run


def _run(options: argparse.Namespace) -> int:
    scenario = load(options.scenario)
    folder = options.out or Path("build/loadtest", scenario.name)
    folder.mkdir(parents=True, exist_ok=True)
    if options.existing == "resume":
        check_resumable(scenario)
    with locked(folder):
        results, records = asyncio.run(_results(scenario, options, folder))
        _write(results, folder)
    print(f"report: {folder / HTML}")
    for problem in results.failed:
        print(f"em-loadtest: {one_line(problem)}", file=sys.stderr)
    if results.failed and any(GONE & stage.errors.keys() for stage in results.stages):
        print("em-loadtest: --resume asks the questions again for which the server was gone", file=sys.stderr)
    else:
        records.run_ended()
    return 1 if results.failed else 0


async def _results(scenario: Scenario, options: argparse.Namespace, folder: Path) -> tuple[Results, Records]:
    began = time.monotonic()
    task = load_task(scenario.task)
    progress = (ProgressTable if sys.stdout.isatty() else ProgressLines)(
        lambda stage: summarize_stage(stage, scenario), TimeLeft(scenario, len(task.questions)), sys.stdout
    )
    try:
        async with Client(options.base_url, options.api_key, scenario.limits) as client:
            model = scenario.model or await _first_model(client)
            server = await environment.server(client, options.server_flags)
            records = Records(folder, describe_run(scenario, model, task.questions), options.existing)
            runner = Runner(scenario, model, task, client, progress, records)
            with progress:
                stages = await runner.run()
    finally:
        task.close()
    stage_results, configs, comparisons, failed = summarize(stages, scenario)
    results = Results(
        name=scenario.name,
        run=Run(
            started=records.started,
            seconds=time.monotonic() - began,
            base_url=options.base_url,
            model=model,
            machine=environment.machine(),
            versions=environment.versions(),
            git_commit=environment.git_commit(),
            server=server,
        ),
        scenario=scenario.model_dump(mode="json", by_alias=True),
        calibration={name: found.summary() for name, found in runner.calibration.items()},
        stages=stage_results,
        configs=configs,
        comparisons=comparisons,
        failed=failed,
    )
    return results, records


async def _first_model(client: Client) -> str:
    """Return the name of the first model that the server lists.

    Raises:
        ScenarioError: if it lists none; names the address and what is there instead.
    """
    url = f"{client.root}/models"
    try:
        listed = parse_json(await client.get(url))
    except ScenarioError as error:
        raise ScenarioError(f"{error} (--base-url, --api-key; or name the `model` in the scenario)") from None
    except ValueError:
        raise ScenarioError(f"{url}: answers with no JSON; is --base-url the address of an API?") from None
    match listed:
        case {"data": [{"id": str(name)}, *_]} if name:
            return name
    raise ScenarioError(f"{url}: got {shortened(listed)}; lists no model: name the `model` in the scenario")


def _write(results: Results, folder: Path) -> None:
    write_json(results, folder / JSON)
    write_csv(results, folder / CSV)
    write_html(results, folder / HTML)


# ---- The other commands


def _report(options: argparse.Namespace) -> int:
    results, folder = read_json(options.results), options.results.parent
    write_html(results, folder / HTML)
    write_csv(results, folder / CSV)
    return 0


def _compare(options: argparse.Namespace) -> int:
    lines, regressed = compare(read_json(options.before), read_json(options.after), options.tolerance)
    _print(lines)
    return 1 if regressed else 0


def _roi(options: argparse.Namespace) -> int:
    results = read_json(options.results)
    workload = options.price_per_hour, options.answers_per_day
    _print(savings(results, options.old, options.new, options.load, *workload))
    return 0


def _print(lines: Sequence[str]) -> None:
    """Print lines; names in results may have characters that control a terminal."""
    for line in lines:
        print(printable(line))


def _mock(options: argparse.Namespace) -> int:
    try:
        script = mock.Script.model_validate(parse_json(options.script))
    except ValidationError as error:
        raise ScenarioError(f"--script: {first_problem(error)}") from None
    except ValueError as error:
        raise ScenarioError(f"--script: got {shortened(options.script)}; is no JSON: {error}") from None
    mock.serve(script, options.host, options.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
