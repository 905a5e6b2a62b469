"""Plots of a load test, each an SVG string for a page; None if the results have nothing to draw.

The same results give the same bytes. A config has the same number and colour in every plot.
"""

import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from loadtest.inputs import one_line
from loadtest.results import ConfigResult, Interval, Results

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")  # Okabe and Ito
MARKERS = "osD^vPX<"  # one more than colours: the first 56 configs all look different
MIN_DRAWN, MAX_DRAWN = 1e-12, 1e12
NAME_WIDTH = 34  # characters of a config's name that a plot shows
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "em-loadtest",
    "svg.fonttype": "none",  # text stays text: smaller, and searchable
    "text.parse_math": False,  # a config may have `$` in its name
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
}
MIN_SPAN = 1.01  # of a logarithmic axis: its highest value over its lowest
DIRECTIONS = tuple((math.cos(turn * math.pi / 4), math.sin(turn * math.pi / 4)) for turn in (1, 7, 3, 5, 0, 4, 2, 6))


def pareto(results: Results, load: str) -> str | None:
    """Draw accuracy over answers per second under one load, and the Pareto front: configs that none beats in both."""
    configs = [config for config in _under(results, load) if config.accuracy and _finite(config.accuracy.value)]
    configs = [config for config in configs if _positive(config.answers_per_second.value)]
    return _svg(f"pareto {load}", (8, 4.4), lambda figure: _pareto(figure, results, configs, load)) if configs else None


def _pareto(figure: Figure, results: Results, configs: Sequence[ConfigResult], load: str) -> None:
    axes = figure.subplots()
    axes.set(xscale="log", xlabel="answers per second", ylabel="accuracy", title=f"Under {load}")
    points = [(config.answers_per_second.value, _value(config.accuracy)) for config in configs]
    front = pareto_front(points)
    axes.plot(*zip(*front, strict=True), "--", color="#888888", linewidth=1, zorder=1)
    for config, (x, y) in zip(configs, points, strict=True):
        axes.errorbar(
            x,
            y,
            xerr=_bars(config.answers_per_second),
            yerr=_bars(config.accuracy),
            elinewidth=0.7,
            markersize=6,
            **_style(results, config.config),
        )
    axes.margins(0.1)
    _format_log_axis(axes, "x")
    figure.legend(
        handles=[
            Line2D([], [], label=_label(results, config.config), **_style(results, config.config)) for config in configs
        ]
        + [Line2D([], [], linestyle="--", color="#888888", label="Pareto front")],
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )
    figure.draw_without_rendering()  # only now are the positions on the canvas known
    _number_points(axes, figure.dpi, points, [str(_number_of(results, config.config)) for config in configs])


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point equals or exceeds in both values, the highest x first."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def latency_against_throughput(results: Results) -> str | None:
    """Draw E2E p50 and p99 over answers per second, for configs with at least two loads."""
    lines = {name: [config for config in results.configs if config.config == name] for name in config_names(results)}
    lines = {name: [config for config in configs if _has_latency(config)] for name, configs in lines.items()}
    lines = {name: configs for name, configs in lines.items() if len(configs) >= 2}
    return _svg("latency", (9, 4.2), lambda figure: _latency(figure, results, lines)) if lines else None


def _has_latency(config: ConfigResult) -> bool:
    return all(map(_positive, (config.answers_per_second.value, config.e2e_p50, config.e2e_p99)))


def _latency(figure: Figure, results: Results, lines: dict[str, list[ConfigResult]]) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for axes, field in zip(panels, ("e2e_p50", "e2e_p99"), strict=True):
        for name, configs in lines.items():
            style = {**_style(results, name), "linestyle": "-"}
            rates = [config.answers_per_second.value for config in configs]
            axes.plot(rates, [getattr(config, field) for config in configs], markersize=4, linewidth=1, **style)
        axes.set(xscale="log", yscale="log", xlabel="answers per second", title=f"E2E {field[-3:]}")
        axes.grid(True, color="#e5e5e5", linewidth=0.6)
        _format_log_axis(axes, "xy")
    panels[0].set_ylabel("seconds to the answer")
    handles = [Line2D([], [], label=_label(results, name), **_style(results, name)) for name in lines]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)


def accuracy_by_config(results: Results, load: str) -> str | None:
    """Draw accuracy with its 95 % interval, a row per config, the best first."""
    configs = [config for config in _under(results, load) if config.accuracy and _finite(config.accuracy.value)]
    configs.sort(key=lambda config: _value(config.accuracy))
    return (
        _svg("accuracy", _rows(configs), lambda figure: _accuracy(figure, results, configs, load)) if configs else None
    )


def _accuracy(figure: Figure, results: Results, configs: Sequence[ConfigResult], load: str) -> None:
    axes = figure.subplots()
    for row, config in enumerate(configs):
        axes.errorbar(
            _value(config.accuracy),
            row,
            xerr=_bars(config.accuracy),
            capsize=2,
            markersize=6,
            **_style(results, config.config),
        )
    axes.set_yticks(range(len(configs)), [_label(results, config.config) for config in configs])
    axes.set(xlabel="accuracy, 95 % interval", title=f"Under {load}")
    axes.grid(True, axis="x", color="#e5e5e5", linewidth=0.6)


def entropy_histograms(results: Results, load: str) -> str | None:
    """Draw histograms of the replies' mean entropy before EM-INF, a panel per config; the line is the median."""
    found = {config.config: [value for value in config.entropies if _finite(value)] for config in _under(results, load)}
    found = {name: values for name, values in found.items() if values}
    if not found:
        return None
    size = (8.0, 1.1 + 1.35 * math.ceil(len(found) / 3))
    return _svg("entropies", size, lambda figure: _entropies(figure, results, found, load))


def _entropies(figure: Figure, results: Results, found: dict[str, list[float]], load: str) -> None:
    columns = min(3, len(found))
    panels = list(figure.subplots(math.ceil(len(found) / 3), columns, sharex=True, squeeze=False).flat)
    highest = max(map(max, found.values()))
    edges = np.linspace(0.0, highest if highest > 0 else 1.0, 31)
    for index, (axes, (name, values)) in enumerate(zip(panels, found.items(), strict=False)):
        counts, _ = np.histogram(values, edges)
        axes.stairs(counts, edges, fill=True, color=_style(results, name)["color"], alpha=0.75)
        axes.axvline(float(np.median(values)), color="#222222", linewidth=1)
        axes.set_title(_label(results, name), fontsize=8)
        axes.set_yticks([])
        axes.set_ylim(bottom=0)
        axes.tick_params(labelbottom=index >= len(found) - columns)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    figure.supxlabel(f"mean entropy of a reply's tokens, nats; under {load}", fontsize=9)


def tokens(results: Results, load: str) -> str | None:
    """Draw output tokens per question, a row per config: those of the reply, and those of discarded samples."""
    configs = [config for config in _under(results, load) if _positive(config.answers_per_second.value)]
    configs = [config for config in configs if _finite(config.output_tokens_per_second.value)]
    configs.sort(key=_tokens_per_question, reverse=True)
    return _svg("tokens", _rows(configs), lambda figure: _tokens(figure, results, configs, load)) if configs else None


def _tokens_per_question(config: ConfigResult) -> float:
    return config.output_tokens_per_second.value / config.answers_per_second.value


def _tokens(figure: Figure, results: Results, configs: Sequence[ConfigResult], load: str) -> None:
    axes = figure.subplots()
    delivered = [config.delivered_tokens_per_second.value / config.answers_per_second.value for config in configs]
    delivered = [value if _finite(value) else 0.0 for value in delivered]
    discarded = [
        max(0.0, _tokens_per_question(config) - reply) for config, reply in zip(configs, delivered, strict=True)
    ]
    axes.barh(range(len(configs)), delivered, color=COLOURS[0], label="of the reply")
    axes.barh(range(len(configs)), discarded, left=delivered, color=COLOURS[5], label="of discarded samples")
    for row, config in enumerate(configs):
        axes.annotate(
            f"{_tokens_per_question(config):,.0f}",
            (_tokens_per_question(config), row),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.margins(x=0.12)
    axes.set_yticks(range(len(configs)), [_label(results, config.config) for config in configs])
    axes.set(xlabel=f"output tokens per question, under {load}")
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)


def config_names(results: Results) -> list[str]:
    """Return the configs' names, each once, in the results' order; a config's number is its position, from 1."""
    return list(dict.fromkeys(config.config for config in results.configs))


def _number_of(results: Results, name: str) -> int:
    return config_names(results).index(name) + 1


def _label(results: Results, name: str) -> str:
    # A line break in a name would be one in the plot, and XML has no control characters.
    return f"{_number_of(results, name)}  {textwrap.shorten(one_line(name), NAME_WIDTH, placeholder='…')}"


def _style(results: Results, name: str) -> dict[str, Any]:
    index = _number_of(results, name) - 1
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "none",
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
    }


def _under(results: Results, load: str) -> list[ConfigResult]:
    return [config for config in results.configs if config.load == load]


def _rows(configs: Sequence[ConfigResult]) -> tuple[float, float]:
    return 7.5, 1.2 + 0.27 * len(configs)


def _finite(value: float | None) -> bool:
    """Return whether a value was measured and can be drawn: axes have no ticks for numbers that nothing has."""
    return value is not None and (value == 0 or MIN_DRAWN < abs(value) < MAX_DRAWN)


def _positive(value: float | None) -> bool:
    """Return whether a logarithmic axis has a place for a value."""
    return _finite(value) and value is not None and value > 0


def _value(interval: Interval | None) -> float:
    return interval.value if interval else math.nan


def _bars(interval: Interval | None) -> list[list[float]] | None:
    if interval is None or not all(map(_finite, (interval.low, interval.value, interval.high))):
        return None
    return [[max(0.0, interval.value - interval.low)], [max(0.0, interval.high - interval.value)]]


def _format_log_axis(axes: Axes, which: str) -> None:
    """Label a logarithmic axis with numbers such as 0.5, 20, 1,000, even if it spans less than a decade."""
    for axis in [axes.xaxis] * ("x" in which) + [axes.yaxis] * ("y" in which):
        low, high = sorted(axis.get_view_interval())
        if high / low < MIN_SPAN:  # one value: by its rounding the axis may have no width
            low, high = low / MIN_SPAN, high * MIN_SPAN
            (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(low, high)
        if high / low > 3:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
        else:
            axis.set_major_locator(MaxNLocator(5))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axis.set_minor_formatter(NullFormatter())


def _number_points(axes: Axes, dpi: float, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Put a number beside each point, in the direction that is farthest from other points and numbers."""
    positions = [tuple(axes.transData.transform(point)) for point in points]
    taken = list(positions)
    points_per_pixel = 72 / dpi
    for point, label, (x, y) in zip(points, labels, positions, strict=True):
        candidates = [
            (x + far * right / points_per_pixel, y + far * up / points_per_pixel)
            for far in (9, 15)
            for right, up in DIRECTIONS
        ]
        others = [other for other in taken if other != (x, y)]
        room = [min([math.dist(candidate, other) for other in others], default=math.inf) for candidate in candidates]
        enough = [min(value, 9 / points_per_pixel) for value in room]  # farther away than this is no better
        best = candidates[enough.index(max(enough))]
        taken.append(best)
        offset = ((best[0] - x) * points_per_pixel, (best[1] - y) * points_per_pixel)
        axes.annotate(
            label, point, offset, textcoords="offset points", ha="center", va="center", fontsize=8, fontweight="bold"
        )


def _svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Draw an `<svg>` element whose ids all begin with the plot's name: a page may hold several."""
    buffer = StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings(action="ignore", category=UserWarning):
        # Of axes without width, if there is one value, and of letters that a font lacks: browsers use another font.
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    prefix = "".join(character if character.isalnum() else f"-{ord(character):x}-" for character in name)
    # Only inside tags: the names of configs must stay as they are.
    return re.sub(r"<[a-zA-Z][^<>]*>", lambda tag: _prefixed(tag[0], prefix), text)


def _prefixed(tag: str, prefix: str) -> str:
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", tag)
