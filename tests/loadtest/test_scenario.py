"""Scenario files: what they may contain, and the errors for all else."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest.scenario import Closed, Scenario, ScenarioError, Sweep, load

GOOD: dict[str, Any] = {
    "name": "s",
    "task": {"type": "demo", "count": 3},
    "arms": {"greedy": {"body": {"temperature": 0}}, "sc": {"vote": {"n": 4}}, "plain": None},
    "loads": [{"type": "closed", "concurrency": 2}],
}


def read(tmp_path: Path, changes: dict[str, Any]) -> Scenario:
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes, sort_keys=False))
    return load(path)


def test_configs_may_be_a_mapping_or_a_list(tmp_path: Path) -> None:
    scenario = read(tmp_path, {})
    assert [config.name for config in scenario.configs] == ["greedy", "sc", "plain"]
    assert read(tmp_path, {"arms": [config.model_dump() for config in scenario.configs]}) == scenario
    assert scenario.compared_with == ("greedy",)
    assert read(tmp_path, {"references": ["sc", "plain"]}).compared_with == ("sc", "plain")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"repetitions": 0}, "repetitions: got 0; Input should be greater than or equal to 1"),
        ({"arms": {}}, "arms: "),
        ({"arms": {"a": {"vote": {"n": 1}}}}, "arms.0.vote.n: got 1"),
        ({"arms": {"a": {"bodi": {}}}}, "arms.0.bodi: "),
        ({"arms": {"a": {"body": {"n": 4}}}}, "arms.a.body.n: one reply per request"),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "names must differ"),
        ({"arms": {"a": {"match_entropy_of": "b"}}}, "arms.a.match_entropy_of: got 'b'"),
        ({"references": ["b"]}, "references: got 'b'; must be one of greedy, sc, plain"),
        ({"task": {"type": "demos"}}, "task: "),
        ({"task": {"type": "file", "path": "x", "checker": "vibes"}}, "task.file.checker: got 'vibes'"),
        ({"loads": [{"type": "poisson", "rate": 0}]}, "loads.0.poisson.rate: got 0"),
        ({"price_per_hour": float("nan")}, "price_per_hour: "),
    ],
)
def test_errors_name_the_field_and_the_file(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        read(tmp_path, changes)
    assert says in str(caught.value)
    assert "scenario.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1", "- 1", "a: b: c"])
def test_a_file_that_is_no_scenario_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=r"x\.yaml"):
        load(path)
    with pytest.raises(ScenarioError, match=r"none\.yaml"):
        load(tmp_path / "none.yaml")


def test_no_two_questions_or_repetitions_share_a_seed(tmp_path: Path) -> None:
    scenario = read(tmp_path, {})
    drawn = {}
    for repetition in range(3):
        for question in range(400):
            seeds = scenario.seeds(repetition, question)
            drawn[repetition, question] = {next(seeds) for _ in range(64)}  # as many as a strategy has branches
    everything = [seed for seeds in drawn.values() for seed in seeds]
    assert len(set(everything)) == len(everything)
    assert drawn[0, 1] == {next(seeds) + i for seeds in [scenario.seeds(0, 1)] for i in range(1)} | {
        1000 + i for i in range(64)
    }


def test_a_sweep_multiplies_the_concurrency_up_to_the_most() -> None:
    sweep = Sweep(type="sweep", start=1, factor=1.5, most=12)
    assert [level.concurrency for level in sweep.levels()] == [1, 2, 3, 4, 7, 10]
    assert [level.concurrency for level in Sweep(type="sweep", most=8).levels()] == [1, 2, 4, 8]
    assert all(isinstance(level, Closed) for level in sweep.levels())
