"""The targets of the transform: the cases that they need, and the figures of a run beside their limits.

On the CPU in units of one log_softmax (16 rows x 151,936, one thread); on CUDA relative to a copy, in time, and
relative to eager torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.transform.cases import CPU, CUDA, Case, Sizes
from benchmarks.transform.results import Result, Results

MAX_SMALL_BATCH_US = 60.0
MIN_SHARE_OF_COPY_BANDWIDTH = 0.85
MAX_FIFTEEN_STEPS_OVER_FIVE = 1.15
MIN_SPEEDUP_OVER_EAGER = 10.0


@dataclass(frozen=True)
class Target:
    """A figure and its limit; each may be missing."""

    name: str
    unit: str
    figure: float | None
    spread: tuple[float, float] | None = None  # quartiles
    limit: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the figure meets its limit; None if one of them is missing."""
        if self.figure is None or self.limit is None:
            return None
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit

    def row(self) -> str:
        """Return a line of a markdown table."""
        figure = "not measured" if self.figure is None else f"{self.figure:.3g}"
        spread = f" ({self.spread[0]:.3g} to {self.spread[1]:.3g})" if self.spread else ""
        limit = "" if self.limit is None else f"{'>=' if self.at_least else '<='} {self.limit:g}"
        met = {True: "yes", False: "**no**", None: ""}[self.met]
        return f"| {self.name} | {limit} | {figure}{spread} | {self.unit} | {met} |"


def log_softmax_cases(base: Case) -> list[tuple[str, Case, float | None]]:
    """Return (name, case, limit in log_softmax) for a base case of five adam steps with all rows active."""
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
        ("p_less", replace(base, method="p_less"), 1.0),
        ("p_less at temperature 0.7", replace(base, method="p_less", temperature=0.7), None),
        ("top_h", replace(base, method="top_h"), 1.5),
        ("top_h, float32 origin", replace(base, method="top_h", origin="float32"), None),
        ("top_n_sigma", replace(base, method="top_n_sigma"), 1.0),
        ("greedy_below", replace(base, method="greedy_below"), 1.0),
    ]


def log_softmax_targets(
    results: Results, base: Case, *, on_one_core: bool, implementation: str = "ours"
) -> list[Target]:
    """Return the figures of `base` and its variants, with limits if they were set for this size, on one core."""
    limits_apply = on_one_core and base == CPU.base
    targets = []
    for name, case, limit in log_softmax_cases(base):
        found = results.get(implementation, case)
        spread = (found.x_log_softmax_low, found.x_log_softmax_high) if found else None
        figure = found.x_log_softmax if found else None
        targets.append(Target(name, "log_softmax", figure, spread, limit if limits_apply else None))
    return targets


def cuda_targets(results: Results, sizes: Sizes, implementation: str = "ours") -> list[Target]:
    """Return the figures with limits on CUDA; none if the vocabulary is not the 151,936 that they were set for."""
    base, targets = sizes.base, []
    if base.vocab != CUDA.base_vocab:
        return []
    for rows in sizes.rows:
        found = results.get(implementation, replace(base, rows=rows))
        if rows >= 256:
            targets.append(_copy_target(rows, found))
        elif rows <= 64:
            figure = found.time_us if found else None
            spread = (found.time_us_low, found.time_us_high) if found else None
            targets.append(Target(f"{rows} rows", "us", figure, spread, MAX_SMALL_BATCH_US))
    five = results.get(implementation, base)
    fifteen, eager = results.get(implementation, replace(base, steps=15)), results.get("eager", base)
    at = f"{base.rows} rows"
    targets.append(
        Target(f"{at}: 15 steps over 5", "times", _ratio(fifteen, five), limit=MAX_FIFTEEN_STEPS_OVER_FIVE),
    )
    targets.append(
        Target(f"{at}: eager over ours", "times", _ratio(eager, five), limit=MIN_SPEEDUP_OVER_EAGER, at_least=True)
    )
    return targets


def _copy_target(rows: int, found: Result | None) -> Target:
    figure = found.of_copy if found else None
    spread = (found.of_copy_low, found.of_copy_high) if found else None
    return Target(f"{rows} rows", "of a copy's bandwidth", figure, spread, MIN_SHARE_OF_COPY_BANDWIDTH, at_least=True)


def _ratio(upper: Result | None, lower: Result | None) -> float | None:
    return upper.time_us / lower.time_us if upper and lower else None


def table(targets: Sequence[Target]) -> str:
    """Return a markdown table with a line for each target."""
    head = "| case | target | figure (quartiles) | in | met |\n|---|---|---|---|---|\n"
    return head + "\n".join(target.row() for target in targets)
