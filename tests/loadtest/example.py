"""A small scenario, and results of a load test that never ran, for tests of the modules that read results."""

from typing import Any

from loadtest.results import (
    Comparison,
    ConfigResult,
    Interval,
    Latency,
    Percentiles,
    Results,
    Run,
    StageResult,
)
from loadtest.scenario import Scenario


def scenario(**changes: Any) -> Scenario:
    """Return a scenario of two configs, ten questions and two repetitions; `changes` replaces fields."""
    settings: dict[str, Any] = {
        "name": "s",
        "task": {"type": "demo", "count": 10},
        "arms": {"a": None, "b": {"body": {"temperature": 0.5}}},
        "loads": [{"type": "closed", "concurrency": 4}],
        "repetitions": 2,
        "warmup": 3,
        "limits": {"lag_ms": 1e6},  # a slow machine must not make a stage invalid
    }
    return Scenario.model_validate(settings | changes)


def interval(value: float, spread: float = 0.02) -> Interval:
    """Return `value` with a range of plus and minus a share `spread` of it."""
    return Interval(value=value, low=value * (1 - spread), high=value * (1 + spread))


def percentiles(p50: float) -> Percentiles:
    """Return percentiles around a median."""
    return Percentiles(count=100, mean=p50 * 1.1, p50=p50, p90=p50 * 1.5, p95=p50 * 1.7, p99=p50 * 2)


def config(name: str, rate: float, accuracy: float | None, load: str = "closed 8", **other: Any) -> ConfigResult:
    """Return a config with `rate` answers per second, 300 output tokens each; `other` replaces fields."""
    correct = None if accuracy is None else rate * accuracy
    fields: dict[str, Any] = {
        "config": name,
        "load": load,
        "target_load": float(load.split()[-1]),
        "repetitions": 3,
        "answers_per_second": interval(rate),
        "correct_per_second": correct and interval(correct),
        "requests_per_second": interval(rate),
        "output_tokens_per_second": interval(rate * 300),
        "delivered_tokens_per_second": interval(rate * 300),
        "goodput": None,
        "accuracy": accuracy and Interval(value=accuracy, low=accuracy - 0.03, high=accuracy + 0.03),
        "tokens_per_correct": correct and rate * 300 / correct,
        "seconds_per_correct": correct and 1 / correct,
        "cost_per_million_tokens": None,
        "cost_per_correct": None,
        "ttft_p50": 0.05,
        "ttft_p99": 0.1,
        "tpot_p50": 0.01,
        "e2e_p50": 8 / rate,
        "e2e_p99": 16 / rate,
        "entropy_before": None,
        "entropy_after": None,
        "optimized_share": None,
        "entropies": [],
    }
    return ConfigResult(**fields | other)


def stage(of: ConfigResult, repetition: int = 0, **other: Any) -> StageResult:
    """Return a repetition of a config; `other` replaces fields."""
    fields: dict[str, Any] = {
        **{name: getattr(of, name) for name in ("config", "load", "target_load", "entropy_before", "entropy_after")},
        "open_loop": False,
        "repetition": repetition,
        "seconds": 10.0,
        "questions": 100,
        "ok": 100,
        "incomplete": 0,
        "failed": 0,
        "errors": {},
        "requests_per_second": of.requests_per_second.value,
        "output_tokens_per_second": of.output_tokens_per_second.value,
        "delivered_tokens_per_second": of.delivered_tokens_per_second.value,
        "answers_per_second": of.answers_per_second.value,
        "correct_per_second": of.correct_per_second and of.correct_per_second.value,
        "goodput": None,
        "prompt_tokens": 5_000,
        "output_tokens": 30_000,
        "counted_output_tokens": 30_000,
        "latency": Latency(
            ttft=None if of.ttft_p50 is None else percentiles(of.ttft_p50),
            tpot=None if of.tpot_p50 is None else percentiles(of.tpot_p50),
            itl=None,
            e2e=None if of.e2e_p50 is None else percentiles(of.e2e_p50),
        ),
        "scheduling_delay_p99": 0.001,
        "accuracy": of.accuracy and of.accuracy.value,
        "optimized_share": of.optimized_share,
        "invalid": [],
        "warnings": [],
    }
    return StageResult(**fields | other)


def comparison(of: ConfigResult, reference: ConfigResult) -> Comparison:
    """Compare two configs by their own figures."""
    difference = None
    if of.accuracy and reference.accuracy:
        value = of.accuracy.value - reference.accuracy.value
        difference = Interval(value=value, low=value - 0.02, high=value + 0.02)
    return Comparison(
        config=of.config,
        reference=reference.config,
        load=of.load,
        answers_per_second_ratio=interval(of.answers_per_second.value / reference.answers_per_second.value),
        tokens_ratio=1.0,
        accuracy_difference=difference,
    )


def results(*configs: ConfigResult, **other: Any) -> Results:
    """Return the results of these configs, the first being the reference; `other` replaces fields."""
    names = list(dict.fromkeys(one.config for one in configs))
    fields: dict[str, Any] = {
        "name": "example",
        "run": Run(
            started="2026-01-02T03:04:05Z",
            seconds=60.0,
            base_url="http://127.0.0.1:8000/v1",
            model="demo",
            machine={"cpu": "two cores"},
            versions={"em-inf-server": "0.1.0"},
            git_commit="abc1234",
            server={"version": "0.32.0"},
        ),
        "scenario": {
            "name": "example",
            "task": {"type": "demo", "count": 100},
            "arms": [{"name": name, "body": {}} for name in names],
            "loads": [{"type": "closed", "concurrency": 8}],
        },
        "calibration": {},
        "stages": [stage(one, repetition) for one in configs for repetition in range(3)],
        "configs": list(configs),
        "comparisons": [
            comparison(one, configs[0])
            for one in configs
            if one.config != configs[0].config and one.load == configs[0].load
        ],
        "failed": [],
    }
    return Results(**fields | other)


def many() -> Results:
    """Return a realistic run: fourteen configs, three of them under three loads, with entropies."""
    tokens = {"sc 4": 4, "sc 8": 8, "sc 16": 16, "client vote 8": 8, "deepconf": 6, "refine": 3}
    table = {
        "greedy": (20.0, 0.52),
        "t=0.3": (20.5, 0.53),
        "t=0.7": (19.8, 0.50),
        "t=1.0": (19.9, 0.44),
        "min-p": (19.5, 0.49),
        "em-inf logits": (19.0, 0.61),
        "em-inf adaptive": (19.2, 0.60),
        "em-inf and t of the same entropy $x_1$": (18.1, 0.585),
        "sc 4": (5.4, 0.57),
        "sc 8": (2.8, 0.60),
        "sc 16": (1.4, 0.62),
        "client vote 8": (2.7, 0.60),
        "deepconf": (3.5, 0.61),
        "refine": (6.0, 0.55),
    }
    configs = []
    for number, (name, (rate, accuracy)) in enumerate(table.items()):
        output_rate = interval(rate * 300 * tokens.get(name, 1))
        entropies = [abs((number * 7 + i * 13) % 50 / 40 + (i % 7) / 10) for i in range(200)] if number < 7 else []
        for load, factor in (("closed 1", 0.2), ("closed 4", 0.6), ("closed 8", 1.0))[
            0 if name in ("greedy", "em-inf logits", "sc 8") else 2 :
        ]:
            configs.append(
                config(
                    name,
                    rate * factor,
                    accuracy,
                    load,
                    output_tokens_per_second=output_rate.model_copy(update={"value": output_rate.value * factor}),
                    entropies=entropies,
                )
            )
    bodies = {name: {"strategy": {"type": "self_consistency"}} for name in ("sc 4", "sc 8", "sc 16")}
    listed = [{"name": name, "body": bodies.get(name, {}), "vote": None} for name in table]
    listed[list(table).index("client vote 8")]["vote"] = {"n": 8}
    built = results(*configs)
    last = [one for one in configs if one.load == "closed 8"]
    return built.model_copy(
        update={
            "scenario": {**built.scenario, "arms": listed},
            "comparisons": [comparison(one, last[0]) for one in last[1:]],
        }
    )
