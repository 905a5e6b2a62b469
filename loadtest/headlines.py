"""What a run found, in sentences: which configs are as accurate as a vote, and how much faster they are."""

from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.compare import accuracy_change
from loadtest.formats import NOT_MEASURED, difference, number
from loadtest.plots import config_names
from loadtest.results import ConfigResult, Results


def headlines(results: Results) -> list[tuple[str, list[str]]]:
    """Return a title and lines for each vote: the configs that are no less accurate, with their speed.

    A vote is compared under the load at which it answers most per second. Without votes, the reference is compared.
    """
    votes = [name for name in config_names(results) if name in _votes(results)]
    reference = next((one.reference for one in results.comparisons), next(iter(config_names(results)), None))
    names = votes or ([reference] if reference else [])
    best = [max(_named(results, name), key=lambda config: config.answers_per_second.value) for name in names]
    return [_headline(results, config, votes) for config in best]


def _headline(results: Results, reference: ConfigResult, votes: Sequence[str]) -> tuple[str, list[str]]:
    others = [
        config
        for config in results.configs
        if config.load == reference.load and config.config not in (reference.config, *votes)
    ]
    others.sort(key=lambda config: config.answers_per_second.value, reverse=True)
    if reference.accuracy is None:
        title = f"Compared with {reference.config}, under {reference.load}; accuracy was not measured"
        return title, [_speed(config, reference) for config in others]
    title = (
        f"Configs at least as accurate as {reference.config} ({number(reference.accuracy.value)}), "
        f"under {reference.load}"
    )
    as_accurate = [one for one in others if one.accuracy and one.accuracy.value >= reference.accuracy.value]
    return title, [_speed_and_accuracy(results, one, reference) for one in as_accurate] or ["No other config."]


def _speed(config: ConfigResult, reference: ConfigResult) -> str:
    new, old = config.answers_per_second.value, reference.answers_per_second.value
    ratio = number(new / old) if old else NOT_MEASURED
    return f"{config.config}: {ratio} times the answers per second ({number(new)} versus {number(old)})"


def _speed_and_accuracy(results: Results, config: ConfigResult, reference: ConfigResult) -> str:
    text = f"{_speed(config, reference)}, accuracy {number(config.accuracy.value if config.accuracy else None)}"
    found = accuracy_change(results, reference.config, config.config, config.load)
    if found is None:
        return text
    change, method = found
    text += f"; the difference, {method}, is {difference(change)}"
    return text + ("" if change.low >= 0 else ", so a loss of accuracy is not excluded")


def _votes(results: Results) -> set[str]:
    """Return the names of the configs that are self-consistency, by the server or by the client."""
    configs = results.scenario.get("arms")
    if isinstance(configs, Mapping):  # as a scenario file may write them
        named = dict(configs)
    else:
        listed = [one for one in configs if isinstance(one, Mapping)] if isinstance(configs, list) else []
        named = {str(one.get("name")): one for one in listed}
    return {name for name, config in named.items() if isinstance(config, Mapping) and _is_vote(config)}


def _is_vote(config: Mapping[str, Any]) -> bool:
    body = config.get("body")
    strategy = body.get("strategy") if isinstance(body, Mapping) else None
    return bool(config.get("vote")) or "self_consistency" in (
        strategy,
        strategy.get("type") if isinstance(strategy, Mapping) else None,
    )


def _named(results: Results, name: str) -> list[ConfigResult]:
    return [config for config in results.configs if config.config == name]
