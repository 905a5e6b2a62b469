"""Progress of a run: a live table on a terminal, else a line per stage."""

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from loadtest.measurements import Stage
from loadtest.results import StageResult

COLUMNS = ("config", "load", "rep", "asked", "answers/s", "output tok/s", "accuracy", "TTFT p50", "E2E p50", "")
MAX_ROWS = 20  # of the live table


class ProgressLines:
    """Prints a line for each stage that has ended."""

    def __init__(self, summarize: Callable[[Stage], StageResult], stages: int | None, output: TextIO) -> None:
        """`stages`: how many the run has; None if unknown."""
        self.summarize = summarize
        self.stages = stages
        self.output = output
        self.ended: list[StageResult] = []

    def stage_began(self, stage: Stage, questions: int) -> None:
        """Print nothing: lines are for stages that have ended."""

    def stage_ended(self, stage: Stage) -> None:
        """Print the stage's figures."""
        result = self.summarize(stage)
        self.ended.append(result)
        total = f"/{self.stages}" if self.stages else ""
        cells = zip(COLUMNS, cells_of(result), strict=True)
        text = "  ".join(f"{name} {cell}".strip() for name, cell in cells if cell)
        print(f"[{len(self.ended)}{total}] {text}", file=self.output, flush=True)


class ProgressTable(ProgressLines):
    """Shows the latest stages and the running one, refreshed twice a second; a context manager."""

    def __init__(self, summarize: Callable[[Stage], StageResult], stages: int | None, output: TextIO) -> None:
        super().__init__(summarize, stages, output)
        self.running: tuple[Stage, int, float] | None = None  # the stage, its questions, when it began
        self.live = Live(console=Console(file=output), refresh_per_second=2, get_renderable=self.table)

    def __enter__(self) -> "ProgressTable":
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def stage_began(self, stage: Stage, questions: int) -> None:
        """Show a row for the running stage."""
        self.running = stage, questions, time.monotonic()

    def stage_ended(self, stage: Stage) -> None:
        """Replace the running row by the stage's figures."""
        self.running = None
        self.ended.append(self.summarize(stage))

    def table(self) -> Table:
        """Render the latest stages, and the running one as far as it is."""
        total = f" of {self.stages}" if self.stages else ""
        table = Table(*COLUMNS, title=f"stage {len(self.ended) + bool(self.running)}{total}")
        for result in self.ended[-MAX_ROWS:]:
            table.add_row(*cells_of(result), style="red" if result.invalid or result.ok < result.questions else "")
        if self.running:
            stage, questions, began = self.running
            rate = len(stage.questions) / max(time.monotonic() - began, 1e-9)
            cells = [f"{len(stage.questions)}/{questions}", f"{rate:.2f}"]
            table.add_row(stage.config, stage.load, str(stage.repetition + 1), *cells, style="bold")
        return table


def cells_of(result: StageResult) -> list[str]:
    """Format a stage's figures, in the order of `COLUMNS`."""
    ttft, e2e = result.latency.ttft, result.latency.e2e
    failed = result.questions - result.ok
    remarks = [*result.invalid, *([f"{failed} not answered"] if failed else []), *result.warnings]
    return [
        result.config,
        result.load,
        str(result.repetition + 1),
        str(result.questions),
        f"{result.answers_per_second:.2f}",
        f"{result.output_tokens_per_second:.0f}",
        "" if result.accuracy is None else f"{result.accuracy:.1%}",
        "" if ttft is None else f"{ttft.p50 * 1000:.0f} ms",
        "" if e2e is None else f"{e2e.p50 * 1000:.0f} ms",
        "; ".join(remarks),
    ]
