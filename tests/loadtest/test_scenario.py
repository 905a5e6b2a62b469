"""Scenario files: what they may contain, and the errors for all else."""

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest.scenario import SEED_STRIDE, Closed, Scenario, ScenarioError, Sweep, load

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
        ({"arms": {"a": {"body": {"n": 4}}}}, "arms.a.body.n: got 4; one reply per request"),
        ({"arms": {"a": {"body": {"n": True}}}}, "arms.a.body.n: got True"),
        ({"arms": {"a": {"body": {"n": "3"}}}}, "arms.a.body.n: got '3'"),
        ({"arms": {"a": {"body": {"n": 0}}}}, "arms.a.body.n: got 0"),
        ({"arms": {"a": {"body": {"best_of": 2}}}}, "arms.a.body.best_of: got 2"),
        ({"request": {"n": 3}}, "scenario.yaml: request.n: got 3; one reply per request"),
        ({"request": {"extra_body": {"n": 3}}}, "request.extra_body: "),
        ({"request": {"seed": 7}}, "request.seed: got 7; must be null"),
        ({"arms": {"a": {"body": {"seed": 7}}}}, "arms.a.body.seed: got 7; must be null"),
        ({"arms": {"a": "b"}}, "arms: a: got 'b'; must be a mapping"),
        ({"arms": {1: None}}, "arms.1: the key is 1; must be text"),
        ({"request": {"a": datetime.date(2026, 1, 2)}}, "request.a: got datetime.date(2026, 1, 2); must be text"),
        ({"request": {"a": b"x"}}, "request.a: got b'x'; must be text"),
        ({"request": {"a": float("inf")}}, "request.a: got inf; must be text"),
        ({"loads": [{"type": "sweep", "start": 9, "most": 8}]}, "start: got 9; must not be above most, 8"),
        ({"loads": [{"type": "sweep", "factor": 1e300}]}, "loads.0.sweep.factor: got 1e+300"),
        ({"limits": {"request_s": 1e300}}, "limits.request_s: got 1e+300"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**31}, "seed: got 2147483648"),
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


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "../../../x", "/tmp/x", "a/b", "a\\b", "a\0b", "a\nb", "\x1b[2J", "x" * 201, "\u20ac" * 67],
)
def test_a_name_cannot_lead_out_of_the_folder_of_results(tmp_path: Path, name: str) -> None:
    with pytest.raises(ScenarioError, match=r"scenario\.yaml: name: got "):
        read(tmp_path, {"name": name})


@pytest.mark.parametrize("name", ["s", "EM-INF 0.3, 15 steps", "...", "\u20ac" * 66])
def test_a_name_may_be_that_of_any_folder(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, {"name": name}).name == name


LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "more than 100,000 values"),
        ("a: &a [*a]", "nested deeper than 64"),
        ("[" * 3000 + "]" * 3000, "nested deeper than 64"),
        ("name: a\nname: b", "line 1: the key 'name' occurs twice"),
        ("request: {temperature: 1, temperature: 0}", "the key 'temperature' occurs twice"),
        ("name:\tx\n\ty: 1", "found character"),
        ("a: !!int x", "invalid literal"),
        ("a: !!bool x", "a value is not of its tag"),
        ("a: !!timestamp x", "a value is not of its tag"),
        ("a: 2001-99-99", "month"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("a: 1" + ":59" * 3000, "a: got a int that is too long to show"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ('a: "\\ud800"', "a: got '\\ud800'; must be text"),
        ("a: .nan", "a: got nan"),
        ("? [1]\n: 2", "found unhashable key"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("\0", "special characters are not allowed"),
        ("x" * (1 << 20) + "y", "is larger than 1 MiB"),
    ],
)
def test_hostile_yaml_is_one_error(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=rf"x\.yaml: .*{re.escape(says)}(?s:.*)"):
        load(path)


def test_aliases_and_merges_of_a_sensible_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "name: s\ntask: {type: demo}\nloads: [{type: closed, concurrency: 1}]\n"
        "arms:\n  a: {body: &a {temperature: 0}}\n  b: {body: {<<: *a, top_p: 0.5}}\n  c: {body: *a}\n"
    )
    assert [config.body for config in load(path).configs] == [
        {"temperature": 0},
        {"temperature": 0, "top_p": 0.5},
        {"temperature": 0},
    ]


def test_binary_files_and_folders_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScenarioError, match=r"x\.yaml: is no UTF-8 at byte 0"):
        load(path)
    with pytest.raises(ScenarioError, match=r": Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "[1", "- 1", "a: b: c"])
def test_a_file_that_is_no_scenario_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=r"x\.yaml"):
        load(path)
    with pytest.raises(ScenarioError, match=r"none\.yaml"):
        load(tmp_path / "none.yaml")


def test_no_two_questions_or_repetitions_share_a_seed_and_all_fit_32_bits(tmp_path: Path) -> None:
    scenario = read(tmp_path, {"repetitions": 4})
    drawn = {}
    for repetition in range(5):  # the last is the warm-up's
        for question in range(400):
            seeds = scenario.seeds(repetition, question, 400)
            drawn[repetition, question] = {next(seeds) for _ in range(SEED_STRIDE)}  # of a vote of 1,000
    everything = [seed for seeds in drawn.values() for seed in seeds]
    assert len(set(everything)) == len(everything)
    assert max(everything) < 2**31
    assert drawn[0, 1] == set(range(1000, 2000)), "the first repetition has the seeds that it always had"


def test_seeds_that_do_not_fit_are_an_error_unless_none_are_sent(tmp_path: Path) -> None:
    read(tmp_path, {"repetitions": 20}).check_seeds(100_000)
    with pytest.raises(ScenarioError, match=r"seed: got 0; with 110,000 questions, 20 repetitions"):
        read(tmp_path, {"repetitions": 20}).check_seeds(110_000)
    read(tmp_path, {"repetitions": 20, "request": {"seed": None}}).check_seeds(110_000)


def test_a_sweep_multiplies_the_concurrency_up_to_the_most() -> None:
    sweep = Sweep(type="sweep", start=1, factor=1.5, most=12)
    assert [level.concurrency for level in sweep.levels()] == [1, 2, 3, 4, 7, 10]
    assert [level.concurrency for level in Sweep(type="sweep", most=8).levels()] == [1, 2, 4, 8]
    assert all(isinstance(level, Closed) for level in sweep.levels())
