"""Whole scenarios against the mock server: what is asked, in what order, and what is made of the answers."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from answers.extract import Answer
from loadtest.cli import main
from loadtest.client import Client
from loadtest.records import Call, Item, Stage
from loadtest.runner import Runner, voted
from loadtest.scenario import Scenario
from loadtest.tasks import load_task
from tests.loadtest.mocked import Served, serve

CLOSED = {"type": "closed", "concurrency": 4}


class Silent:
    def __init__(self) -> None:
        self.items = 0

    def stage_began(self, stage: Stage, questions: int) -> None: ...

    def item_ended(self, stage: Stage, item: Item) -> None:
        self.items += 1

    def stage_ended(self, stage: Stage) -> None: ...


def scenario(**changes: Any) -> Scenario:
    settings: dict[str, Any] = {
        "name": "s",
        "task": {"type": "demo", "count": 10},
        "arms": {"a": None, "b": {"body": {"temperature": 0.5}}},
        "loads": [CLOSED],
        "repetitions": 2,
        "warmup": 3,
    }
    return Scenario.model_validate(settings | changes)


def run(served: Served, **changes: Any) -> list[Stage]:
    chosen = scenario(**changes)
    task = load_task(chosen.task)

    async def all_of_it() -> list[Stage]:
        async with Client(served.url, None, chosen.limits) as client:
            return await Runner(chosen, "mock", task, client, Silent(), lambda _: None).run()

    try:
        return asyncio.run(all_of_it())
    finally:
        task.close()


def test_every_arm_asks_the_same_with_the_same_seeds_and_no_two_questions_share_one() -> None:
    with serve() as served:
        stages = run(served)
        bodies = served.mock.bodies
    assert Counter((stage.arm, stage.repetition) for stage in stages) == {(a, r): 1 for a in "ab" for r in (0, 1)}
    asked = {
        (stage.arm, stage.repetition): {item.index: item.calls[0].seed for item in stage.items} for stage in stages
    }
    assert asked["a", 0] == asked["b", 0]
    assert asked["a", 1] == asked["b", 1]
    seeds = [*asked["a", 0].values(), *asked["a", 1].values()]
    assert len(set(seeds)) == len(seeds) == 20
    assert len(bodies) == 4 * (10 + 3)
    warm_up = Counter(body["seed"] for body in bodies if body["seed"] not in set(seeds))
    assert sum(warm_up.values()) == 4 * 3
    assert {body.get("temperature") for body in bodies} == {None, 0.5}
    assert all(item.correct and item.answer for stage in stages for item in stage.items)


def test_the_order_of_arms_is_drawn_anew_in_each_repetition() -> None:
    arms = {f"arm {i}": None for i in range(4)}
    with serve(tokens=1) as served:
        stages = run(served, arms=arms, repetitions=3, warmup=0, task={"type": "demo", "count": 1})
    orders = [tuple(stage.arm for stage in stages[4 * i : 4 * i + 4]) for i in range(3)]
    assert all(sorted(order) == sorted(arms) for order in orders)
    assert len(set(orders)) > 1


def test_in_an_open_loop_all_arms_have_the_same_arrivals_and_repetitions_others() -> None:
    with serve(tokens=1) as served:
        stages = run(served, loads=[{"type": "poisson", "rate": 200}], warmup=0)
    arrivals = {
        (stage.arm, stage.repetition): sorted((item.scheduled, item.index) for item in stage.items) for stage in stages
    }
    assert arrivals["a", 0] == arrivals["b", 0] != arrivals["a", 1] == arrivals["b", 1]


def test_fields_are_laid_over_and_null_removes_one() -> None:
    with serve() as served:
        request = {"temperature": 1.0, "max_tokens": 9}
        run(served, request=request, arms={"a": {"body": {"max_tokens": None, "top_p": 0.5}}}, system="Be brief.")
        body = served.mock.bodies[-1]
    assert "max_tokens" not in body
    assert (body["temperature"], body["top_p"], body["model"]) == (1.0, 0.5, "mock")
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_the_servers_counters_are_those_of_the_stage_alone() -> None:
    with serve(tokens=7) as served:
        stages = run(served)
    assert {stage.counted_output_tokens for stage in stages} == {70}
    assert all(
        stage.counted_prompt_tokens == sum(call.prompt_tokens or 0 for item in stage.items for call in item.calls)
        for stage in stages
    )


def test_accuracy_is_what_the_server_was_scripted_to_have_and_a_vote_is_better() -> None:
    with serve(accuracy=0.6, tokens=1) as served:
        stages = run(
            served,
            arms={"one": None, "vote": {"vote": {"n": 9}}},
            task={"type": "demo", "count": 150},
            repetitions=1,
            warmup=0,
        )
    right = {stage.arm: sum(bool(item.correct) for item in stage.items) for stage in stages}
    assert 0.45 < right["one"] / 150 < 0.75
    assert right["vote"] / 150 > 0.9
    votes = next(stage for stage in stages if stage.arm == "vote")
    assert all(len({call.seed for call in item.calls}) == 9 for item in votes.items)


def test_a_sweep_ends_where_more_concurrency_gives_no_more() -> None:
    """The mock has no limit, so that the first levels grow; with a gain of 1,000 % none is enough after the first."""
    load = {"type": "sweep", "most": 64}
    with serve(tokens=1, first_token=0.02) as served:
        settings: dict[str, Any] = {"repetitions": 1, "warmup": 0, "arms": {"a": None}}
        stages = run(served, loads=[load | {"most": 4}], **settings)
        assert [stage.offered for stage in stages] == [1, 2, 4]
        stages = run(served, loads=[load | {"gain": 10.0}], **settings)
        assert [stage.offered for stage in stages] == [1, 2]


def test_the_reply_of_a_vote_is_the_first_with_its_answer_of_those_that_were_whole() -> None:
    find = Answer().extract
    calls = [Call(seed=i, status="ok", text=f"\\boxed{{{answer}}}") for i, answer in enumerate((3, 5, 4, 5))]
    calls.append(Call(seed=9, status="incomplete", text="\\boxed{3}"))
    assert voted(calls, find) is calls[1]
    assert voted([calls[4]], find) is None
    silent = [Call(seed=1, status="ok", text="none")]
    assert voted(silent, find) is silent[0]


def write(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(scenario(**changes).model_dump(mode="json")))
    return path


def test_the_command_writes_everything_and_says_what_it_did(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    with serve(tokens=4) as served:
        assert main(["run", str(write(tmp_path)), "--base-url", served.url, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
        "requests.jsonl",
        "results.json",
        "stages.csv",
    ]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("[1/4] arm ")
    assert printed[-1] == f"report: {out}/report.html"
    lines = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert {line["reply"] for line in lines} == {0}
    results = json.loads((out / "results.json").read_text())
    assert results["run"]["model"] == "mock"
    assert results["failed"] == []
    assert [arm["accuracy"]["value"] for arm in results["arms"]] == [1, 1]
    (out / "report.html").unlink()
    assert main(["report", str(out / "results.json")]) == 0
    assert (out / "report.html").exists()
    assert main(["compare", str(out / "results.json"), str(out / "results.json")]) == 0
    roi = ["roi", str(out / "results.json"), "--from", "a", "--to", "b", "--price-per-hour", "2"]
    assert main(roi) == 0
    assert main([*roi[:-1], "0"]) == 2


@pytest.mark.parametrize(
    ("script", "kind"), [({"refused": 0.5}, "HTTP 500"), ({"reset": 0.5}, "connection"), ({"stalled": 0.5}, "stalled")]
)
def test_a_server_that_fails_is_reported_not_averaged_away(tmp_path: Path, capsys: Any, script: Any, kind: str) -> None:
    out = tmp_path / "out"
    with serve(tokens=4, **script) as served:
        path = write(tmp_path, limits={"stall_s": 0.5}, arms={"a": None})
        assert main(["run", str(path), "--base-url", served.url, "--out", str(out)]) == 1
    assert "of 10 questions were not answered" in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    for stage in results["stages"]:
        assert stage["ok"] + stage["incomplete"] + stage["failed"] == stage["items"] == 10
        assert sum(stage["errors"].values()) == stage["incomplete"] + stage["failed"]
    assert {kind} == {each for stage in results["stages"] for each in stage["errors"]}


def test_a_server_that_lies_in_usage_is_found_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for script in ({"usage_factor": 3.0}, {"usage_factor": 0.5}, {"no_usage": True}):
        with serve(tokens=8, **script) as served:
            main(["run", str(write(tmp_path)), "--base-url", served.url, "--out", str(out)])
        results = json.loads((out / "results.json").read_text())
        assert all(any("usage" in warning for warning in stage["warnings"]) for stage in results["stages"]), script


def test_what_is_wrong_is_one_line_and_status_2(tmp_path: Path, capsys: Any) -> None:
    assert main(["run", str(tmp_path / "none.yaml")]) == 2
    assert main(["run", str(write(tmp_path)), "--base-url", "http://127.0.0.1:9", "--out", str(tmp_path / "o")]) == 2
    assert main(["run", str(write(tmp_path)), "--base-url", "nowhere:x", "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 3
    assert "http://127.0.0.1:9/v1/models does not answer" in error[1]
