"""The result of one implementation on one case, and all results of a run as CSV (columns: see `__main__.py`)."""

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks.transform.cases import Case
from benchmarks.transform.timing import RoundTimes
from loadtest import environment

BYTES_PER_LOGIT = 8  # one read and one write of a float32
COLUMNS = {"implementation": "arm"}  # the name of a field in the CSV, if it is another one
NAN = math.nan


@dataclass(frozen=True)
class Machine:
    """The machine that a run was made on."""

    device: str
    torch_version: str
    threads: int

    @classmethod
    def of(cls, device: torch.device) -> "Machine":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else environment.machine()["processor"]
        return cls(name, torch.__version__, torch.get_num_threads())


@dataclass(frozen=True)
class Result:
    """Medians and quartiles over the rounds; NaN if the implementation failed."""

    implementation: str
    rows: int
    vocab: int
    steps: int
    share: float
    origin: str
    method: str
    temperature: float
    time_us: float = NAN
    time_us_low: float = NAN
    time_us_high: float = NAN
    host_us: float = NAN
    gb_per_s: float = NAN
    copy_us: float = NAN
    of_copy: float = NAN
    of_copy_low: float = NAN
    of_copy_high: float = NAN
    log_softmax_us: float = NAN
    x_log_softmax: float = NAN
    x_log_softmax_low: float = NAN
    x_log_softmax_high: float = NAN
    rounds: int = 0
    status: str = "ok"

    @classmethod
    def of(cls, implementation: str, case: Case, rounds: Sequence[RoundTimes]) -> "Result":
        """Summarize the rounds. A ratio is of two times of one round: what slows a complete round cancels."""
        low, time, high = _quartiles([each.call * 1e6 for each in rounds])
        of_copy = _quartiles([each.copy / each.call for each in rounds])
        of_log_softmax = _quartiles([each.call / each.log_softmax for each in rounds])
        return cls(
            implementation,
            **asdict(case),
            time_us=time,
            time_us_low=low,
            time_us_high=high,
            host_us=statistics.median(each.host for each in rounds) * 1e6,
            gb_per_s=BYTES_PER_LOGIT * case.rows * case.vocab / time / 1e3,
            copy_us=statistics.median(each.copy for each in rounds) * 1e6,
            of_copy=of_copy[1],
            of_copy_low=of_copy[0],
            of_copy_high=of_copy[2],
            log_softmax_us=statistics.median(each.log_softmax for each in rounds) * 1e6,
            x_log_softmax=of_log_softmax[1],
            x_log_softmax_low=of_log_softmax[0],
            x_log_softmax_high=of_log_softmax[2],
            rounds=len(rounds),
        )

    @classmethod
    def failed(cls, implementation: str, case: Case, error: Exception) -> "Result":
        """Return a result without figures, with the first line of the error."""
        lines = str(error).strip().splitlines() or [""]
        return cls(implementation, **asdict(case), status=f"failed: {type(error).__name__}: {lines[0][:200]}")

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def __str__(self) -> str:
        if not self.ok:
            return f"{self.implementation:9} {self.status}"
        host = "" if self.host_us == self.time_us else f", {self.host_us:,.1f} us of the host"
        quartiles = f"({self.x_log_softmax_low:.2f} to {self.x_log_softmax_high:.2f})"
        return (
            f"{self.implementation:9} {self.time_us:11,.1f} us {self.gb_per_s:8,.1f} GB/s  "
            f"{self.of_copy:7.1%} of a copy's  {self.x_log_softmax:7.2f} x log_softmax {quartiles}{host}"
        )


class Results(list[Result]):
    """The results of a run."""

    def get(self, implementation: str, case: Case) -> Result | None:
        """Return None if it was not measured or failed."""
        wanted = asdict(case) | {"implementation": implementation, "status": "ok"}
        matching = (result for result in self if all(getattr(result, k) == v for k, v in wanted.items()))
        return next(matching, None)

    def save(self, path: Path, machine: Machine) -> None:
        """Write CSV: the machine's columns, then the result's. A reader finds the old file or the new one, complete."""
        names = [COLUMNS.get(field.name, field.name) for field in (*fields(Machine), *fields(Result))]
        unfinished = path.with_name(f".{path.name}.new")
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(asdict(machine) | _rounded(result) for result in self)
        unfinished.replace(path)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def _rounded(result: Result) -> dict[str, object]:
    """Round to six significant digits, more than any clock here gives."""
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in asdict(result).items()}
    return {COLUMNS.get(name, name): value for name, value in rounded.items()}
