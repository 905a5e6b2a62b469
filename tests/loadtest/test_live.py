"""What is seen while a run goes on."""

import io

from rich.console import Console

from loadtest.live import Lines, LiveTable
from loadtest.records import Call, Item, Stage
from loadtest.results import StageResult
from loadtest.scenario import Scenario
from loadtest.summary import summarize_stage

SCENARIO = Scenario.model_validate(
    {"name": "s", "task": {"type": "demo"}, "arms": {"plain": None}, "loads": [{"type": "closed", "concurrency": 2}]}
)


def summarize(stage: Stage) -> StageResult:
    return summarize_stage(stage, SCENARIO)


def ended(status: str = "ok", error: str | None = None) -> Stage:
    call = Call(
        seed=1, sent=0.0, first=0.25, last=0.5, status=status, error=error, output_tokens=10, delivered_tokens=10
    )  # type: ignore[arg-type]
    item = Item(0, 0.0, [call], reply=call if status == "ok" else None, correct=status == "ok")
    return Stage("plain", "closed 2", 2, False, 0, [item], seconds=0.5)


def test_a_line_for_each_stage_with_what_was_not_as_it_should_be() -> None:
    output = io.StringIO()
    lines = Lines(summarize, 2, output)
    for stage in (ended(), ended("failed", "HTTP 500: x")):
        lines.stage_ended(stage)
    good, bad = output.getvalue().splitlines()
    assert good == (
        "[1/2] arm plain  load closed 2  rep 1  asked 1  answers/s 2.00  output tok/s 20  accuracy 100.0%  "
        "TTFT p50 250 ms  E2E p50 500 ms"
    )
    assert bad.startswith("[2/2] arm plain")
    assert "1 not answered" in bad


def test_the_table_has_the_stages_and_the_one_that_runs() -> None:
    live = LiveTable(summarize, None, io.StringIO())
    live.stage_ended(ended())
    running = ended()
    running.arm = "slow"
    live.stage_began(running, 8)
    console = Console(file=io.StringIO(), width=160)
    console.print(live.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "stage 2" in text
    assert "plain" in text and "2.00" in text
    assert "slow" in text and "1/8" in text
    live.stage_ended(running)
    assert live.running is None and len(live.ended) == 2
    with live:  # as a terminal has it
        pass
