"""The measurements of the serving benchmark, as a table, as findings about the targets, and as CSV."""

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from benchmarks.intervals import median_and_range, paired_ratios, ratio_interval
from benchmarks.serving.configs import CONFIGS, MODELS, OFF, ON, PLAIN


@dataclass(frozen=True)
class Measurement:
    """One config's requests in one round; round -1 warms up, and it alone has `optimised`."""

    concurrency: int
    round: int
    config: str
    rate: float  # output tokens per second
    start: int = 0  # which start of the servers
    other_cores: float = 0.0  # cores that the rest of the machine kept busy
    optimised: float | None = None  # share of the tokens with at least one gradient step


def rates_of(measurements: Iterable[Measurement], concurrency: int, config: str) -> list[float]:
    """Return output tokens per second of each round, without the rounds that warm up."""
    wanted = (concurrency, config)
    return [each.rate for each in measurements if (each.concurrency, each.config) == wanted and each.round >= 0]


def print_report(
    model: str, concurrencies: Sequence[int], measurements: Sequence[Measurement], released: Sequence[float]
) -> None:
    """Print a table with a row for each config at each concurrency, and what it says about the targets."""
    print(f"\n| {model}: concurrency | config | output tokens/s | of | same round, median | 95 % | tokens optimised |")
    print("|---|---|---|---|---|---|---|")
    for concurrency in concurrencies:
        for config in CONFIGS:
            print(_row(measurements, concurrency, config))
    if released:
        print(f"| 1 | released, transformers | {median_and_range(released, 1)} | | | | |")
    print()
    for concurrency in concurrencies:
        print("\n".join(_findings(model, measurements, concurrency, released)))


def _row(measurements: Sequence[Measurement], concurrency: int, config: str) -> str:
    rates, base = rates_of(measurements, concurrency, config), CONFIGS[config].base
    warm_up = (concurrency, config, -1)
    first = next(each for each in measurements if (each.concurrency, each.config, each.round) == warm_up)
    cells = [str(concurrency), config, median_and_range(rates, 0)]
    if base:
        ratios = paired_ratios(rates, rates_of(measurements, concurrency, base))
        interval = ratio_interval(ratios, _starts(measurements))
        cells += [base, f"{statistics.median(ratios):.3f}", "{:.3f} to {:.3f}".format(*interval)]
    else:
        cells += [""] * 3
    cells.append("" if first.optimised is None else f"{first.optimised:.1%}")
    return f"| {' | '.join(cells)} |"


def _findings(
    model: str, measurements: Sequence[Measurement], concurrency: int, released: Sequence[float]
) -> list[str]:
    plain, off, on = (rates_of(measurements, concurrency, config) for config in (PLAIN, OFF, ON))
    low, high = ratio_interval(paired_ratios(off, plain), _starts(measurements))
    share, target = statistics.median(paired_ratios(on, off)), MODELS[model].target
    found = [
        f"off / plain vLLM: the interval {'includes' if low <= 1 <= high else 'excludes'} 1",
        f"on / off {share:.3f}: {'meets' if share >= target else 'misses'} {target}",
    ]
    if released:
        ratio = statistics.median(on) / statistics.median(released)
        found.append(f"on / released: {ratio:.1f} times as many tokens per second")
    return [f"- concurrency {concurrency}, {each}" for each in found]


def _starts(measurements: Iterable[Measurement]) -> int:
    return len({each.start for each in measurements})


def write_csv(path: Path, model: str, measurements: Iterable[Measurement], released: Iterable[float]) -> None:
    """Write every measurement, warm-ups too; the released method has a round for each prompt."""
    rows = [astuple(each) for each in measurements]
    rows += [(1, number, "released", rate, None, None, None) for number, rate in enumerate(released)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("model", "concurrency", "round", "arm", "tokens_per_second", "start", "other_cores", "optimised")
        )
        writer.writerows((model, *row) for row in rows)
