"""The output during a run: lines, and the live table."""

import io

from rich.console import Console

from loadtest.measurements import MeasuredQuestion, MeasuredRequest, Stage
from loadtest.progress import ProgressLines, ProgressTable
from loadtest.results import StageResult
from loadtest.scenario import Scenario
from loadtest.stage_summary import summarize_stage

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


def test_each_stage_has_a_line_that_ends_with_its_problems() -> None:
    output = io.StringIO()
    lines = ProgressLines(summarize, 2, output)
    for stage in (ended(), ended("failed", "HTTP 500: x")):
        lines.stage_ended(stage)
    good, bad = output.getvalue().splitlines()
    assert good == (
        "[1/2] config plain  load closed 2  rep 1  asked 1  answers/s 2.00  output tok/s 20  accuracy 100.0%  "
        "TTFT p50 250 ms  E2E p50 500 ms"
    )
    assert bad.startswith("[2/2] config plain")
    assert "1 not answered" in bad


def test_the_table_has_the_ended_stages_and_the_running_one() -> None:
    table = ProgressTable(summarize, None, io.StringIO())
    table.stage_ended(ended())
    running = ended()
    running.config = "slow"
    table.stage_began(running, 8)
    console = Console(file=io.StringIO(), width=160)
    console.print(table.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "stage 2" in text
    assert "plain" in text and "2.00" in text
    assert "slow" in text and "1/8" in text
    table.stage_ended(running)
    assert table.running is None and len(table.ended) == 2
    with table:  # starts and stops the display
        pass
