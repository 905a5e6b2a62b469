"""Progress of a run: a live table on a terminal, else lines: of what ended, and every half minute of what runs."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from loadtest.calibrate import MAX_PASSES, TOLERANCE, Calibration, Pass
from loadtest.formats import duration, number
from loadtest.measurements import Stage
from loadtest.results import StageResult
from loadtest.time_left import CALIBRATION, Part, TimeLeft

COLUMNS = ("config", "load", "rep", "asked", "answers/s", "output tok/s", "accuracy", "TTFT p50", "E2E p50", "")
MAX_ROWS = 20  # of the live table
INTERVAL_S = 30.0  # between two lines on what runs


@dataclass(frozen=True)
class Running:
    """A stage or a pass that runs; its questions are those of `of`, which grows."""

    of: Stage | Pass
    questions: int
    already: int  # done by an earlier sitting
    began: float

    @property
    def done(self) -> int:
        """How many questions are done."""
        return len(self.of.questions if isinstance(self.of, Stage) else self.of.replies)

    def rate(self, now: float) -> float:
        """Return the answers per second since it began."""
        return (self.done - self.already) / max(now - self.began, 1e-9)


class Progress:
    """What has ended and what runs; a context manager, to be entered where an event loop runs."""

    def __init__(
        self,
        summarize: Callable[[Stage], StageResult],
        time_left: TimeLeft,
        output: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`time_left`: of a run that has not begun."""
        self.summarize = summarize
        self.output = output
        self.clock = clock
        self.ended: list[StageResult] = []
        self.running: Running | None = None
        self._time_left = time_left
        self._since = clock()  # when the last part ended: the time of a stage is with that of its warm-up

    def pass_began(self, asked: Pass) -> None:
        """Note that a pass runs; the one before has ended."""
        self._end_part()
        self.running = Running(asked, asked.questions, 0, self.clock())

    def calibration_ended(self, config: str, found: Calibration) -> None:
        """Note that the last pass has ended."""
        self._end_part()
        self._time_left.calibrated(config)

    def stage_began(self, stage: Stage, questions: int) -> None:
        """Note that a stage runs; the questions that it has already are those of an earlier sitting."""
        self._time_left.calibrated()
        self.running = Running(stage, questions, len(stage.questions), self.clock())

    def stage_ended(self, stage: Stage) -> None:
        """Note a stage's figures."""
        self._end_part()
        self.ended.append(self.summarize(stage))

    def time_left(self) -> str:
        """Return the time that is left, as text."""
        seconds = self._time_left.seconds(self._part())
        return "time left unknown" if seconds is None else f"time left {duration(seconds)}"

    def position(self, stage: int) -> str:
        """Return a stage's number, and how many there are if it is known."""
        return f"{stage}/{self._time_left.stages}" if self._time_left.stages else str(stage)

    def _part(self) -> Part | None:
        running = self.running
        if running is None:
            return None
        load = running.of.load if isinstance(running.of, Stage) else CALIBRATION
        kind, asked = (running.of.config, load), running.done - running.already
        return Part(kind, running.questions, running.done, asked, self.clock() - self._since)

    def _end_part(self) -> None:
        if part := self._part():
            self._time_left.ended(part)
        self.running, self._since = None, self.clock()


class ProgressLines(Progress):
    """Prints a line when a pass begins, when a calibration or a stage has ended, and every `INTERVAL_S`."""

    def __init__(
        self,
        summarize: Callable[[Stage], StageResult],
        time_left: TimeLeft,
        output: TextIO,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        super().__init__(summarize, time_left, output, clock)
        self._sleep = sleep

    def __enter__(self) -> Self:
        self._ticker = asyncio.get_running_loop().create_task(self._tick())
        return self

    def __exit__(self, *error: object) -> None:
        self._ticker.cancel()

    def pass_began(self, asked: Pass) -> None:
        """Print what is asked."""
        super().pass_began(asked)
        self.print_running()

    def calibration_ended(self, config: str, found: Calibration) -> None:
        """Print the temperature."""
        super().calibration_ended(config, found)
        self._print(f"[{CALIBRATION}] config {config}  {text_of(found)}  {self.time_left()}")

    def stage_ended(self, stage: Stage) -> None:
        """Print the stage's figures."""
        super().stage_ended(stage)
        cells = zip(COLUMNS, cells_of(self.ended[-1]), strict=True)
        text = "  ".join(f"{name} {cell}".strip() for name, cell in cells if cell)
        self._print(f"[{self.position(len(self.ended))}] {text}  {self.time_left()}")

    def print_running(self) -> None:
        """Print what runs, how far it is, and the time left."""
        running = self.running
        if running is None:  # a warm-up, or the server is asked what it is
            self._print(f"[{self.position(len(self.ended) + 1)}] about to begin  {self.time_left()}")
            return
        if isinstance(running.of, Pass):
            what = f"[{CALIBRATION}] config {running.of.config}  {name_of(running.of)}"
        else:
            place = f"load {running.of.load}  rep {running.of.repetition + 1}"
            what = f"[{self.position(len(self.ended) + 1)}] config {running.of.config}  {place}"
        rate = f"answers/s {running.rate(self.clock()):.2f}"
        self._print(f"{what}  done {running.done}/{running.questions}  {rate}  {self.time_left()}")

    async def _tick(self) -> None:
        while True:
            await self._sleep(INTERVAL_S)
            self.print_running()

    def _print(self, line: str) -> None:
        print(line, file=self.output, flush=True)


class ProgressTable(Progress):
    """Shows the latest stages and what runs, refreshed twice a second."""

    def __init__(
        self,
        summarize: Callable[[Stage], StageResult],
        time_left: TimeLeft,
        output: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(summarize, time_left, output, clock)
        self.calibrated: list[tuple[str, Calibration]] = []
        self.live = Live(console=Console(file=output), refresh_per_second=2, get_renderable=self.table)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def calibration_ended(self, config: str, found: Calibration) -> None:
        """Show a row for the temperature."""
        super().calibration_ended(config, found)
        self.calibrated.append((config, found))

    def table(self) -> Table:
        """Render the matched temperatures, the latest stages, and what runs as far as it is."""
        running = self.running
        is_stage = running is not None and isinstance(running.of, Stage)
        table = Table(*COLUMNS, title=f"stage {self.position(len(self.ended) + is_stage)}, {self.time_left()}")
        remarks = len(COLUMNS) - 3  # the last column's place after the first two
        for config, found in self.calibrated:
            style = "" if found.within_tolerance else "red"
            table.add_row(config, CALIBRATION, *[""] * remarks, text_of(found), style=style)
        for result in self.ended[-MAX_ROWS:]:
            table.add_row(*cells_of(result), style="red" if result.invalid or result.ok < result.questions else "")
        if running:
            cells = [f"{running.done}/{running.questions}", f"{running.rate(self.clock()):.2f}"]
            if isinstance(running.of, Pass):
                cells += [""] * (remarks - 3) + [name_of(running.of)]
                table.add_row(running.of.config, CALIBRATION, "", *cells, style="bold")
            else:
                table.add_row(running.of.config, running.of.load, str(running.of.repetition + 1), *cells, style="bold")
        return table


def name_of(asked: Pass) -> str:
    """Return what a pass of a calibration is."""
    if asked.temperature is None:
        return f"the entropy to match; then at most {MAX_PASSES} passes"
    return f"pass {asked.number} of at most {MAX_PASSES}, at temperature {asked.temperature:g}"


def text_of(found: Calibration) -> str:
    """Return a matched temperature and how well it matches."""
    within = f"{'' if found.within_tolerance else 'not '}within {TOLERANCE:.0%} of {number(found.target)}"
    return f"temperature {found.temperature:g}, entropy {number(found.entropy)}, {within}, passes {found.passes}"


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
