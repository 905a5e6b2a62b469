"""The report of a run: one HTML page that needs no other file."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from loadtest import plots, tables
from loadtest.calibrate import TOLERANCE
from loadtest.formats import number
from loadtest.headlines import headlines
from loadtest.results import Results, StageResult
from loadtest.storage import write_text
from loadtest.tables import Row

MAX_PARETO_PLOTS = 4  # a sweep has many loads
MAX_NAMED_STAGES = 3  # that one alarm lists


@dataclass(frozen=True)
class Section:
    """A table, plots, or both; the page leaves it out if it has neither."""

    id: str
    title: str
    note: str = ""
    heading: Sequence[str] = ()
    rows: Sequence[Row] = ()
    plots: Sequence[Markup] = ()


def write_html(results: Results, path: Path) -> None:
    """Write the report.

    Raises:
        OSError: if it cannot be written; a file that was at `path` is unchanged.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("loadtest").joinpath("report.html.jinja").read_text("utf-8"))
    page = template.render(
        results=results,
        alarms=list(_alarms(results)),
        headlines=headlines(results),
        sections=list(_sections(results)),
        scenario=_scenario_yaml(results),
    )
    write_text(path, page)


def _alarms(results: Results) -> Iterator[str]:
    """Yield every reason not to trust the figures; a reason that several stages have, once."""
    yield from (f"The run failed: {reason}" for reason in results.failed)
    for config, found in results.calibration.items():
        yield from (f"Warning: {config}: {text}" for text in _calibration_warnings(found))
    stages_by_reason: dict[str, list[str]] = {}
    for stage in results.stages:
        for kind, texts in (("Invalid", stage.invalid), ("Warning", stage.warnings)):
            for text in texts:
                stages_by_reason.setdefault(f"{kind}: {text}", []).append(_stage_name(stage))
    for reason, stages in stages_by_reason.items():
        rest = len(stages) - MAX_NAMED_STAGES
        yield f"{reason} ({'; '.join(stages[:MAX_NAMED_STAGES])}{f' and {rest} more' if rest > 0 else ''})"


def _calibration_warnings(found: Mapping[str, float]) -> Iterator[str]:
    """Yield why a matched temperature is in doubt; results of earlier versions do not say it."""
    if found.get("within_tolerance") is False:
        entropy, target = number(found.get("entropy")), number(found.get("target"))
        yield f"the entropy at its temperature is {entropy}, not within {TOLERANCE:.0%} of {target}, as it should be"
    if found.get("incomplete"):
        yield f"{found['incomplete']:.0f} replies by which its temperature was matched were not complete"


def _stage_name(stage: StageResult) -> str:
    return f"{stage.config}, {stage.load}, repetition {stage.repetition + 1}"


def _sections(results: Results) -> Iterator[Section]:
    note = "Rates: median and range of the valid repetitions. Accuracy: 95 % interval, bootstrap over questions."
    yield Section("configs", "Configs", note, ["config", *tables.CONFIG_COLUMNS], tables.config_rows(results))
    note = "Speed: median and range of the repetitions. Accuracy: paired by question, 95 % interval."
    heading = ["config", *tables.COMPARISON_COLUMNS]
    yield Section("comparisons", "Comparisons", note, heading, tables.comparison_rows(results))
    note = "The numbers of the configs are those of the table above."
    yield Section("plots", "Plots", note, plots=_plots(results))
    note = "Red: invalid, not counted in the figures of its config."
    yield Section("stages", "Stages", note, ["config", *tables.STAGE_COLUMNS], tables.stage_rows(results))
    heading = ["error", "config", "load", "requests"]
    yield Section("errors", "Errors", "Requests, by kind of error.", heading, tables.error_rows(results))
    heading = ["reason", "config", "load", "replies"]
    note = "Replies that are not correct, by the kind of reason that the checker gives."
    yield Section("problems", "Reasons", note, heading, tables.problem_rows(results))
    heading = ["config", "figure", "value"]
    yield Section("calibration", "Matched temperatures", "", heading, tables.calibration_rows(results))
    yield Section("run", "Run", "", ["property", "value"], list(tables.run_rows(results)))


def _plots(results: Results) -> list[Markup]:
    """Draw the plots that have data. Those of one load show the load that most configs have."""
    counts = Counter(config.load for config in results.configs)
    if not counts:
        return []
    loads = sorted(counts, key=lambda load: counts[load], reverse=True)
    main = [load for load in counts if counts[load] == counts[loads[0]]][-1]  # the last: the heaviest of a sweep
    drawn = [plots.pareto(results, load) for load in loads[:MAX_PARETO_PLOTS] if counts[load] > 1 or load == main]
    drawn.append(plots.latency_against_throughput(results))
    drawn += [draw(results, main) for draw in (plots.accuracy_by_config, plots.tokens, plots.entropy_histograms)]
    return [Markup(svg) for svg in drawn if svg]  # plots.py has escaped their text already


def _scenario_yaml(results: Results) -> str:
    content = results.model_dump(mode="json", include={"scenario"})["scenario"]
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100))
