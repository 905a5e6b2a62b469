"""What is seen while a run goes on: a table on a terminal, a line for each stage otherwise."""

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from loadtest.records import Item, Stage
from loadtest.results import StageResult

COLUMNS = ("arm", "load", "rep", "asked", "answers/s", "output tok/s", "accuracy", "TTFT p50", "E2E p50", "")


class Lines:
    """One line for each stage."""

    def __init__(self, summarize: Callable[[Stage], StageResult], stages: int | None, output: TextIO) -> None:
        """`stages`: how many there will be, where that is known."""
        self.summarize = summarize
        self.stages = stages
        self.output = output
        self.ended: list[StageResult] = []

    def stage_began(self, stage: Stage, questions: int) -> None:
        """Says nothing yet."""

    def item_ended(self, stage: Stage, item: Item) -> None:
        """The same."""

    def stage_ended(self, stage: Stage) -> None:
        """A line."""
        result = self.summarize(stage)
        self.ended.append(result)
        of = f"/{self.stages}" if self.stages else ""
        cells = zip(COLUMNS, cells_of(result), strict=True)
        text = "  ".join(f"{name} {cell}".strip() for name, cell in cells if cell)
        print(f"[{len(self.ended)}{of}] {text}", file=self.output, flush=True)


class LiveTable(Lines):
    """The stages so far, and the one that runs, twice a second."""

    def __init__(self, summarize: Callable[[Stage], StageResult], stages: int | None, output: TextIO) -> None:
        super().__init__(summarize, stages, output)
        self.running: tuple[Stage, int, float] | None = None
        self.live = Live(console=Console(file=output), refresh_per_second=2, get_renderable=self.table)

    def __enter__(self) -> "LiveTable":
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def stage_began(self, stage: Stage, questions: int) -> None:
        """A row that grows."""
        self.running = stage, questions, time.monotonic()

    def stage_ended(self, stage: Stage) -> None:
        """Its figures."""
        self.running = None
        self.ended.append(self.summarize(stage))

    def table(self) -> Table:
        """The last stages, as many as fit."""
        of = f" of {self.stages}" if self.stages else ""
        table = Table(*COLUMNS, title=f"stage {len(self.ended) + bool(self.running)}{of}")
        for result in self.ended[-20:]:
            table.add_row(*cells_of(result), style="red" if result.invalid or result.ok < result.items else "")
        if self.running:
            stage, questions, began = self.running
            rate = len(stage.items) / max(time.monotonic() - began, 1e-9)
            cells = [f"{len(stage.items)}/{questions}", f"{rate:.2f}"]
            table.add_row(stage.arm, stage.load, str(stage.repetition + 1), *cells, style="bold")
        return table


def cells_of(result: StageResult) -> list[str]:
    """As in `COLUMNS`."""
    ttft, e2e = result.latency.ttft, result.latency.e2e
    failed = result.items - result.ok
    remarks = [*result.invalid, *([f"{failed} not answered"] if failed else []), *result.warnings]
    return [
        result.arm,
        result.load,
        str(result.repetition + 1),
        str(result.items),
        f"{result.answers_per_second:.2f}",
        f"{result.output_tokens_per_second:.0f}",
        "" if result.accuracy is None else f"{result.accuracy:.1%}",
        "" if ttft is None else f"{ttft.p50 * 1000:.0f} ms",
        "" if e2e is None else f"{e2e.p50 * 1000:.0f} ms",
        "; ".join(remarks),
    ]
