"""The plot of a run of the benchmark of the transform: time against rows, and time against steps, an arm each line."""

from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.cases import Case, Sizes
from benchmarks.results import Machine, Result, Results

COLOURS = {"ours": "#0b7a75", "compiled": "#c9772b", "eager": "#6a4c93", "released": "#b23a48"}
OTHER = "#444444"
TICKS = {
    1e-6: "1 µs",
    1e-5: "10 µs",
    1e-4: "100 µs",
    1e-3: "1 ms",
    1e-2: "10 ms",
    1e-1: "100 ms",
    1.0: "1 s",
    10.0: "10 s",
}


def plot(results: Results, sizes: Sizes, machine: Machine, path: Path) -> None:
    """Write a PNG of both panels."""
    base = sizes.base
    figure = Figure(figsize=(10, 4.4), layout="constrained", dpi=150)
    rows_axes, steps_axes = figure.subplots(1, 2, sharey=True)
    rows = tuple(sorted(sizes.rows))
    steps = tuple(sorted(sizes.steps))
    _panel(rows_axes, results, {n: replace(base, rows=n) for n in rows})
    _panel(steps_axes, results, {n: replace(base, steps=n) for n in steps})
    rows_axes.set(xlabel="rows", ylabel="time of one call", title=f"{base.steps} steps")
    steps_axes.set(xlabel="steps", title=f"{base.rows} rows")
    rows_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: TICKS.get(float(f"{value:.0e}"), "")))
    threads = f"{machine.threads} thread{'s' if machine.threads > 1 else ''}"
    where = f"{machine.device}, {threads}, torch {machine.torch_version}"
    figure.suptitle(f"EM-INF, vocabulary {base.vocab:,}, all rows active: {where}", fontsize=10)
    handles, labels = rows_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path)


def _panel(axes: Axes, results: Results, cases: dict[int, Case]) -> None:
    """Lines over `cases`, which are by their place on the x axis."""
    for arm in dict.fromkeys(result.arm for result in results):
        found = {x: results.get(arm, case) for x, case in cases.items()}
        times = {x: result.time_us / 1e6 for x, result in found.items() if result}
        if times:
            axes.plot(list(times), list(times.values()), "o-", color=COLOURS.get(arm, OTHER), label=arm, markersize=4)
    _floor(axes, results, cases, "log_softmax_us", "one log_softmax", ":")
    _floor(axes, results, cases, "copy_us", "one copy", "--")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(list(cases), [str(x) for x in cases])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _floor(axes: Axes, results: Results, cases: dict[int, Case], column: str, label: str, style: str) -> None:
    """What every arm was held against in its own rounds: the least of them."""
    times = {x: [getattr(result, column) / 1e6 for result in _of_case(results, case)] for x, case in cases.items()}
    times = {x: values for x, values in times.items() if values}
    axes.plot(list(times), [min(values) for values in times.values()], style, color="#888888", label=label)


def _of_case(results: Results, case: Case) -> list[Result]:
    arms = dict.fromkeys(result.arm for result in results)
    return [found for arm in arms if (found := results.get(arm, case))]
