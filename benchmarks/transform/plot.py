"""Plots a run of the benchmark: time against rows and time against steps, with a line for each implementation."""

from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.transform.cases import Case, Sizes
from benchmarks.transform.results import Machine, Result, Results

COLOURS = {"ours": "#0b7a75", "compiled": "#c9772b", "eager": "#6a4c93", "released": "#b23a48"}
OTHER_COLOUR = "#444444"
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
    machine_text = f"{machine.device}, {threads}, torch {machine.torch_version}"
    figure.suptitle(f"EM-INF, vocabulary {base.vocab:,}, all rows active: {machine_text}", fontsize=10)
    handles, labels = rows_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path)


def _panel(axes: Axes, results: Results, cases: dict[int, Case]) -> None:
    """Draw a line for each implementation over `cases`, keyed by their value on the x axis."""
    for implementation in dict.fromkeys(result.implementation for result in results):
        found = {x: results.get(implementation, case) for x, case in cases.items()}
        times = {x: result.time_us / 1e6 for x, result in found.items() if result}
        if times:
            axes.plot(
                list(times),
                list(times.values()),
                "o-",
                color=COLOURS.get(implementation, OTHER_COLOUR),
                label=implementation,
                markersize=4,
            )
    _reference_line(axes, results, cases, "log_softmax_us", "one log_softmax", ":")
    _reference_line(axes, results, cases, "copy_us", "one copy", "--")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(list(cases), [str(x) for x in cases])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _reference_line(axes: Axes, results: Results, cases: dict[int, Case], column: str, label: str, style: str) -> None:
    """Draw what every implementation was compared with in its own rounds: the fastest of these."""
    times = {x: [getattr(result, column) / 1e6 for result in _of_case(results, case)] for x, case in cases.items()}
    times = {x: values for x, values in times.items() if values}
    axes.plot(list(times), [min(values) for values in times.values()], style, color="#888888", label=label)


def _of_case(results: Results, case: Case) -> list[Result]:
    implementations = dict.fromkeys(result.implementation for result in results)
    return [found for implementation in implementations if (found := results.get(implementation, case))]
