"""The transform's targets and how far a run meets them: cases to measure, and figures read from the results.

On the CPU in units of one log_softmax (16 rows x 151,936, one thread); on CUDA against a copy, the clock and eager.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.cases import CPU, CUDA, Case, Sizes
from benchmarks.results import Result, Results

MICROSECONDS_OF_A_SMALL_BATCH = 60.0
SHARE_OF_A_COPY = 0.85
FIFTEEN_STEPS_OVER_FIVE = 1.15
TIMES_FASTER_THAN_EAGER = 10.0


@dataclass(frozen=True)
class Target:
    """A figure beside its limit; either may be missing."""

    name: str
    unit: str
    figure: float | None
    spread: tuple[float, float] | None = None  # quartiles
    limit: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """None where there is nothing to compare."""
        if self.figure is None or self.limit is None:
            return None
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit

    def row(self) -> str:
        """A line of a markdown table."""
        figure = "not measured" if self.figure is None else f"{self.figure:.3g}"
        spread = f" ({self.spread[0]:.3g} to {self.spread[1]:.3g})" if self.spread else ""
        limit = "" if self.limit is None else f"{'>=' if self.at_least else '<='} {self.limit:g}"
        met = {True: "yes", False: "**no**", None: ""}[self.met]
        return f"| {self.name} | {limit} | {figure}{spread} | {self.unit} | {met} |"


def log_softmax_cases(base: Case) -> list[tuple[str, Case, float | None]]:
    """(name, case, at most so many log_softmax) for a base of five adam steps, all rows active."""
    return [
        ("5 steps", base, 2.0),
        ("64 steps", replace(base, steps=64), 3.0),
        ("every row below its threshold", replace(base, share=0.0), 0.7),
        ("adaptive temperature", replace(base, method="adaptive"), 2.0),
        ("5 steps, float32 origin", replace(base, origin="float32"), 8.0),
        ("5 steps, penalised origin", replace(base, origin="penalised"), None),
        ("5 steps, 0.2 of the rows active", replace(base, share=0.2), None),
        ("5 steps, sgd", replace(base, method="sgd"), None),
        ("mixed methods", replace(base, method="mixed"), None),
    ]


def log_softmax_targets(results: Results, base: Case, *, on_one_core: bool, arm: str = "ours") -> list[Target]:
    """Figures for `base` and its like; limits beside them where they were set for it: its size, on one core."""
    limits_apply = on_one_core and base == CPU.base
    targets = []
    for name, case, limit in log_softmax_cases(base):
        found = results.get(arm, case)
        spread = (found.x_log_softmax_low, found.x_log_softmax_high) if found else None
        figure = found.x_log_softmax if found else None
        targets.append(Target(name, "log_softmax", figure, spread, limit if limits_apply else None))
    return targets


def cuda_targets(results: Results, sizes: Sizes, arm: str = "ours") -> list[Target]:
    """The limits that hold at a vocabulary of 151,936."""
    base, targets = sizes.base, []
    if base.vocab != CUDA.base_vocab:
        return []
    for rows in sizes.rows:
        found = results.get(arm, replace(base, rows=rows))
        if rows >= 256:
            targets.append(_copy_target(rows, found))
        elif rows <= 64:
            figure = found.time_us if found else None
            spread = (found.time_us_low, found.time_us_high) if found else None
            targets.append(Target(f"{rows} rows", "us", figure, spread, MICROSECONDS_OF_A_SMALL_BATCH))
    five = results.get(arm, base)
    fifteen, eager = results.get(arm, replace(base, steps=15)), results.get("eager", base)
    at = f"{base.rows} rows"
    targets.append(
        Target(f"{at}: 15 steps over 5", "times", _ratio(fifteen, five), limit=FIFTEEN_STEPS_OVER_FIVE),
    )
    targets.append(
        Target(f"{at}: eager over ours", "times", _ratio(eager, five), limit=TIMES_FASTER_THAN_EAGER, at_least=True)
    )
    return targets


def _copy_target(rows: int, found: Result | None) -> Target:
    figure = found.of_copy if found else None
    spread = (found.of_copy_low, found.of_copy_high) if found else None
    return Target(f"{rows} rows", "of a copy's bandwidth", figure, spread, SHARE_OF_A_COPY, at_least=True)


def _ratio(upper: Result | None, lower: Result | None) -> float | None:
    return upper.time_us / lower.time_us if upper and lower else None


def table(targets: Sequence[Target]) -> str:
    """Markdown: target beside figure."""
    head = "| case | target | figure (quartiles) | in | met |\n|---|---|---|---|---|\n"
    return head + "\n".join(target.row() for target in targets)
