"""Plots of a load test, each an SVG string to put into a page; None where the results have nothing to draw.

Same results, same bytes. An arm has the same number and colour in every plot.
"""

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from loadtest.results import ArmResult, Interval, Results

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")  # Okabe and Ito
MARKERS = "osD^vPX<"  # one more than colours: no arm of the first 56 looks like another
NAME_WIDTH = 34  # characters of an arm's name that a plot shows
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "em-loadtest",
    "svg.fonttype": "none",  # text stays text: small, and can be searched
    "text.parse_math": False,  # an arm may have `$` in its name
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
}
AROUND = tuple((math.cos(turn * math.pi / 4), math.sin(turn * math.pi / 4)) for turn in (1, 7, 3, 5, 0, 4, 2, 6))


def pareto(results: Results, load: str) -> str | None:
    """Accuracy against answers per second under one load, with the arms that no other beats in both joined."""
    arms = [arm for arm in _under(results, load) if arm.accuracy and _finite(arm.accuracy.value)]
    arms = [arm for arm in arms if arm.answers_per_second.value > 0]  # the scale is logarithmic
    return _svg(f"pareto {load}", (8, 4.4), lambda figure: _pareto(figure, results, arms, load)) if arms else None


def _pareto(figure: Figure, results: Results, arms: Sequence[ArmResult], load: str) -> None:
    axes = figure.subplots()
    axes.set(xscale="log", xlabel="answers per second", ylabel="accuracy", title=f"Under {load}")
    points = [(arm.answers_per_second.value, _value(arm.accuracy)) for arm in arms]
    front = pareto_front(points)
    axes.plot(*zip(*front, strict=True), "--", color="#888888", linewidth=1, zorder=1)
    for arm, (x, y) in zip(arms, points, strict=True):
        axes.errorbar(
            x,
            y,
            xerr=_bars(arm.answers_per_second),
            yerr=_bars(arm.accuracy),
            elinewidth=0.7,
            markersize=6,
            **_look(results, arm.arm),
        )
    axes.margins(0.1)
    _plain(axes, "x")
    figure.legend(
        handles=[Line2D([], [], label=_label(results, arm.arm), **_look(results, arm.arm)) for arm in arms]
        + [Line2D([], [], linestyle="--", color="#888888", label="Pareto front")],
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )
    figure.draw_without_rendering()  # places on the canvas are known only now
    _number(axes, figure.dpi, points, [str(_number_of(results, arm.arm)) for arm in arms])


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other has both values at least as high as, the highest x first."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def latency_against_throughput(results: Results) -> str | None:
    """Seconds to an answer, p50 and p99, against answers per second, of arms with at least two loads."""
    lines = {name: [arm for arm in results.arms if arm.arm == name] for name in arm_names(results)}
    lines = {name: [arm for arm in arms if _has_latency(arm)] for name, arms in lines.items()}
    lines = {name: arms for name, arms in lines.items() if len(arms) >= 2}
    return _svg("latency", (9, 4.2), lambda figure: _latency(figure, results, lines)) if lines else None


def _has_latency(arm: ArmResult) -> bool:
    return all(value and _finite(value) for value in (arm.answers_per_second.value, arm.e2e_p50, arm.e2e_p99))


def _latency(figure: Figure, results: Results, lines: dict[str, list[ArmResult]]) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for axes, field in zip(panels, ("e2e_p50", "e2e_p99"), strict=True):
        for name, arms in lines.items():
            look = {**_look(results, name), "linestyle": "-"}
            rates = [arm.answers_per_second.value for arm in arms]
            axes.plot(rates, [getattr(arm, field) for arm in arms], markersize=4, linewidth=1, **look)
        axes.set(xscale="log", yscale="log", xlabel="answers per second", title=f"E2E {field[-3:]}")
        axes.grid(True, color="#e5e5e5", linewidth=0.6)
        _plain(axes, "xy")
    panels[0].set_ylabel("seconds to the answer")
    handles = [Line2D([], [], label=_label(results, name), **_look(results, name)) for name in lines]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)


def accuracy_by_arm(results: Results, load: str) -> str | None:
    """Accuracy with its 95 % interval, an arm each row, the best first."""
    arms = [arm for arm in _under(results, load) if arm.accuracy and _finite(arm.accuracy.value)]
    arms.sort(key=lambda arm: _value(arm.accuracy))
    return _svg("accuracy", _rows(arms), lambda figure: _accuracy(figure, results, arms, load)) if arms else None


def _accuracy(figure: Figure, results: Results, arms: Sequence[ArmResult], load: str) -> None:
    axes = figure.subplots()
    for row, arm in enumerate(arms):
        axes.errorbar(
            _value(arm.accuracy), row, xerr=_bars(arm.accuracy), capsize=2, markersize=6, **_look(results, arm.arm)
        )
    axes.set_yticks(range(len(arms)), [_label(results, arm.arm) for arm in arms])
    axes.set(xlabel="accuracy, 95 % interval", title=f"Under {load}")
    axes.grid(True, axis="x", color="#e5e5e5", linewidth=0.6)


def entropy_histograms(results: Results, load: str) -> str | None:
    """Replies by their mean entropy before EM-INF, a panel per arm that reports entropies; the line is the median."""
    found = {arm.arm: [value for value in arm.entropies if _finite(value)] for arm in _under(results, load)}
    found = {name: values for name, values in found.items() if values}
    if not found:
        return None
    size = (8.0, 1.1 + 1.35 * math.ceil(len(found) / 3))
    return _svg("entropies", size, lambda figure: _entropies(figure, results, found, load))


def _entropies(figure: Figure, results: Results, found: dict[str, list[float]], load: str) -> None:
    columns = min(3, len(found))
    panels = list(figure.subplots(math.ceil(len(found) / 3), columns, sharex=True, squeeze=False).flat)
    edges = np.linspace(0.0, max(map(max, found.values())) or 1.0, 31)
    for place, (axes, (name, values)) in enumerate(zip(panels, found.items(), strict=False)):
        counts, _ = np.histogram(values, edges)
        axes.stairs(counts, edges, fill=True, color=_look(results, name)["color"], alpha=0.75)
        axes.axvline(float(np.median(values)), color="#222222", linewidth=1)
        axes.set_title(_label(results, name), fontsize=8)
        axes.set_yticks([])
        axes.set_ylim(bottom=0)
        axes.tick_params(labelbottom=place >= len(found) - columns)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    figure.supxlabel(f"mean entropy of a reply's tokens, nats; under {load}", fontsize=9)


def tokens(results: Results, load: str) -> str | None:
    """Output tokens per question, an arm each row: those of the reply itself, and those spent to find it."""
    arms = [arm for arm in _under(results, load) if arm.answers_per_second.value > 0]
    arms = [arm for arm in arms if _finite(arm.output_tokens_per_second.value)]
    arms.sort(key=_spent, reverse=True)
    return _svg("tokens", _rows(arms), lambda figure: _tokens(figure, results, arms, load)) if arms else None


def _spent(arm: ArmResult) -> float:
    return arm.output_tokens_per_second.value / arm.answers_per_second.value


def _tokens(figure: Figure, results: Results, arms: Sequence[ArmResult], load: str) -> None:
    axes = figure.subplots()
    delivered = [arm.delivered_tokens_per_second.value / arm.answers_per_second.value for arm in arms]
    delivered = [value if _finite(value) else 0.0 for value in delivered]
    beyond = [max(0.0, _spent(arm) - reply) for arm, reply in zip(arms, delivered, strict=True)]
    axes.barh(range(len(arms)), delivered, color=COLOURS[0], label="of the reply")
    axes.barh(range(len(arms)), beyond, left=delivered, color=COLOURS[5], label="spent beside it")
    for row, arm in enumerate(arms):
        axes.annotate(
            f"{_spent(arm):,.0f}", (_spent(arm), row), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.margins(x=0.12)
    axes.set_yticks(range(len(arms)), [_label(results, arm.arm) for arm in arms])
    axes.set(xlabel=f"output tokens per question, under {load}")
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)


def arm_names(results: Results) -> list[str]:
    """The arms, each once, in the results' order; an arm's number is its place here, from 1."""
    return list(dict.fromkeys(arm.arm for arm in results.arms))


def _number_of(results: Results, name: str) -> int:
    return arm_names(results).index(name) + 1


def _label(results: Results, name: str) -> str:
    # Through split(): a line break in a name would be one in the plot.
    return f"{_number_of(results, name)}  {textwrap.shorten(' '.join(name.split()), NAME_WIDTH, placeholder='…')}"


def _look(results: Results, name: str) -> dict[str, Any]:
    index = _number_of(results, name) - 1
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "none",
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
    }


def _under(results: Results, load: str) -> list[ArmResult]:
    return [arm for arm in results.arms if arm.load == load]


def _rows(arms: Sequence[ArmResult]) -> tuple[float, float]:
    return 7.5, 1.2 + 0.27 * len(arms)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _value(interval: Interval | None) -> float:
    return interval.value if interval else math.nan


def _bars(interval: Interval | None) -> list[list[float]] | None:
    if interval is None or not all(map(math.isfinite, (interval.low, interval.value, interval.high))):
        return None
    return [[max(0.0, interval.value - interval.low)], [max(0.0, interval.high - interval.value)]]


def _plain(axes: Axes, which: str) -> None:
    """Numbers of a logarithmic axis as 0.5, 20, 1,000; also where it is shorter than a decade."""
    for axis in [axes.xaxis] * ("x" in which) + [axes.yaxis] * ("y" in which):
        low, high = sorted(axis.get_view_interval())
        if high / low > 3:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
        else:
            axis.set_major_locator(MaxNLocator(5))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axis.set_minor_formatter(NullFormatter())


def _number(axes: Axes, dpi: float, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """A number beside each point, at the place around it that is farthest from other points and numbers."""
    places = [tuple(axes.transData.transform(point)) for point in points]
    taken = list(places)
    points_per_pixel = 72 / dpi
    for point, label, (x, y) in zip(points, labels, places, strict=True):
        candidates = [
            (x + far * right / points_per_pixel, y + far * up / points_per_pixel)
            for far in (9, 15)
            for right, up in AROUND
        ]
        others = [place for place in taken if place != (x, y)]
        room = [min([math.dist(candidate, other) for other in others], default=math.inf) for candidate in candidates]
        enough = [min(value, 9 / points_per_pixel) for value in room]  # no farther away than it takes
        best = candidates[enough.index(max(enough))]
        taken.append(best)
        offset = ((best[0] - x) * points_per_pixel, (best[1] - y) * points_per_pixel)
        axes.annotate(
            label, point, offset, textcoords="offset points", ha="center", va="center", fontsize=8, fontweight="bold"
        )


def _svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """An `<svg>` element whose ids all begin with the plot's name: a page may hold several."""
    buffer = StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    prefix = "".join(character if character.isalnum() else f"-{ord(character):x}-" for character in name)
    # Only inside of tags: what an arm is called is not ours to change.
    return re.sub(r"<[a-zA-Z][^<>]*>", lambda tag: _prefixed(tag[0], prefix), text)


def _prefixed(tag: str, prefix: str) -> str:
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", tag)
