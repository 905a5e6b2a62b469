"""The output during a run: lines, and the live table."""

import asyncio
import io

from rich.console import Console

from loadtest.calibrate import Calibration, Pass
from loadtest.measurements import MeasuredQuestion, MeasuredRequest, Stage
from loadtest.progress import INTERVAL_S, ProgressLines, ProgressTable
from loadtest.results import StageResult
from loadtest.scenario import Scenario
from loadtest.stage_summary import summarize_stage
from loadtest.time_left import TimeLeft
from tests.loadtest.example import scenario

SCENARIO = Scenario.model_validate(
    {"name": "s", "task": {"type": "demo"}, "arms": {"plain": None}, "loads": [{"type": "closed", "concurrency": 2}]}
)


def summarize(stage: Stage) -> StageResult:
    return summarize_stage(stage, SCENARIO)


def ended(status: str = "ok", error: str | None = None) -> Stage:
    request = MeasuredRequest(
        seed=1, sent=0.0, first=0.25, last=0.5, status=status, error=error, output_tokens=10, delivered_tokens=10
    )  # type: ignore[arg-type]
    question = MeasuredQuestion(0, 0.0, [request], reply=request if status == "ok" else None, correct=status == "ok")
    return Stage("plain", "closed 2", 2, False, 0, [question], seconds=0.5)


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(clock: Clock, **changes: object) -> tuple[ProgressLines, io.StringIO]:
    """Return the progress of a run with 10 questions, and what it prints."""
    output = io.StringIO()
    loads = [{"type": "closed", "concurrency": 2}]
    return ProgressLines(summarize, TimeLeft(scenario(loads=loads, **changes), 10), output, clock), output


MATCHED = {"plain": {"body": {"em_inf": {}}}, "matched": {"match_entropy_of": "plain"}}


def test_each_stage_has_a_line_that_ends_with_its_problems_and_the_time_left() -> None:
    clock = Clock()
    progress, output = lines(clock, arms={"plain": None}, repetitions=2)
    for stage in (ended(), ended("failed", "HTTP 500: x")):
        running = Stage("plain", "closed 2", 2, False, 0)
        progress.stage_began(running, 10)
        running.questions += stage.questions * 10
        clock.now += 30
        progress.stage_ended(stage)
    good, bad = output.getvalue().splitlines()
    assert good == (
        "[1/2] config plain  load closed 2  rep 1  asked 1  answers/s 2.00  output tok/s 20  accuracy 100.0%  "
        "TTFT p50 250 ms  E2E p50 500 ms  time left 30 s"
    )
    assert bad.startswith("[2/2] config plain")
    assert "1 not answered" in bad and bad.endswith("time left 0 s")


def test_a_line_says_what_runs_how_far_it_is_and_the_time_left() -> None:
    clock = Clock()
    progress, output = lines(clock, arms={"plain": None}, repetitions=2)
    progress.print_running()
    stage = Stage("plain", "closed 2", 2, False, 1)
    progress.stage_began(stage, 10)
    clock.now += 20
    progress.print_running()
    stage.questions += ended().questions * 5
    progress.print_running()
    assert output.getvalue().splitlines() == [
        "[1/2] about to begin  time left unknown",
        "[1/2] config plain  load closed 2  rep 2  done 0/10  answers/s 0.00  time left unknown",
        "[1/2] config plain  load closed 2  rep 2  done 5/10  answers/s 0.25  time left 60 s",
    ]


def test_questions_of_an_earlier_sitting_are_done_but_have_no_rate() -> None:
    clock = Clock()
    progress, output = lines(clock, arms={"plain": None}, repetitions=1)
    stage = ended()
    stage.questions *= 6
    progress.stage_began(stage, 10)
    stage.questions += ended().questions * 2
    clock.now += 20
    progress.print_running()
    assert output.getvalue().rstrip().endswith("done 8/10  answers/s 0.10  time left 20 s")


def test_a_calibration_has_a_line_when_a_pass_begins_and_when_it_has_ended() -> None:
    clock = Clock()
    progress, output = lines(clock, arms=MATCHED, repetitions=1)
    for number, temperature in enumerate((None, 0.61, 0.5731)):
        asked = Pass("matched", number, temperature, 10)
        progress.pass_began(asked)
        asked.replies += [MeasuredRequest(seed=0)] * 10
        clock.now += 60
    progress.print_running()
    progress.calibration_ended("matched", Calibration(0.5731, 0.285, 0.281, passes=2))
    progress.calibration_ended("matched", Calibration(0.5731, 0.385, 0.281, passes=3))
    assert output.getvalue().splitlines() == [
        "[calibration] config matched  the entropy to match; then at most 3 passes  done 0/10  answers/s 0.00  "
        "time left unknown",
        "[calibration] config matched  pass 1 of at most 3, at temperature 0.61  done 0/10  answers/s 0.00  "
        "time left 5 min",
        "[calibration] config matched  pass 2 of at most 3, at temperature 0.5731  done 0/10  answers/s 0.00  "
        "time left 4 min",
        "[calibration] config matched  pass 2 of at most 3, at temperature 0.5731  done 10/10  answers/s 0.17  "
        "time left 3 min",
        "[calibration] config matched  temperature 0.5731, entropy 0.285, within 3% of 0.281, passes 2  "
        "time left 2 min",
        "[calibration] config matched  temperature 0.5731, entropy 0.385, not within 3% of 0.281, passes 3  "
        "time left 2 min",
    ]


def test_a_line_comes_every_half_minute_as_long_as_the_run_lasts() -> None:
    output, slept = io.StringIO(), list[float]()

    async def run() -> None:
        enough = asyncio.Event()

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 4:
                enough.set()
                await asyncio.Event().wait()

        with ProgressLines(summarize, TimeLeft(SCENARIO, 10), output, Clock(), sleep):
            await enough.wait()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "it ends with the run"

    asyncio.run(run())
    assert slept == [INTERVAL_S] * 4
    assert len(output.getvalue().splitlines()) == 3


def shown(table: ProgressTable) -> str:
    console = Console(file=io.StringIO(), width=220)
    console.print(table.table())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_has_the_calibration_and_the_time_left() -> None:
    clock = Clock()
    table = ProgressTable(summarize, TimeLeft(scenario(arms=MATCHED, repetitions=1), 10), io.StringIO(), clock)
    asked = Pass("matched", 1, 0.61, 10)
    table.pass_began(asked)
    asked.replies += [MeasuredRequest(seed=0)] * 4
    clock.now += 8
    text = shown(table)
    assert "stage 0/2, time left 112 s" not in text and "stage 0/2, time left 2 min" in text
    assert "4/10" in text and "0.50" in text and "pass 1 of at most 3, at temperature 0.61" in text
    table.calibration_ended("matched", Calibration(0.61, 0.285, 0.281, passes=1))
    assert "temperature 0.61, entropy 0.285, within 3% of 0.281, passes 1" in shown(table)


def test_the_table_has_the_ended_stages_and_the_running_one() -> None:
    table = ProgressTable(summarize, TimeLeft(SCENARIO, 8), io.StringIO())
    table.stage_ended(ended())
    running = ended()
    running.config = "slow"
    table.stage_began(running, 8)
    text = shown(table)
    assert "stage 2/3, time left unknown" in text
    assert "plain" in text and "2.00" in text
    assert "slow" in text and "1/8" in text
    table.stage_ended(running)
    assert table.running is None and len(table.ended) == 2
    with table:  # starts and stops the display
        pass
