"""Scenarios against the mock server: what is asked, in which order, and which reply wins a vote."""

import asyncio
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from answers.extract import Answer
from loadtest import runner
from loadtest.calibrate import Calibration, Pass
from loadtest.client import Client
from loadtest.measurements import MeasuredRequest, Stage
from loadtest.records import Records
from loadtest.runner import Runner, answers_per_second, vote_winner
from loadtest.tasks.registry import load_task
from tests.loadtest import measured
from tests.loadtest.example import scenario
from tests.loadtest.mock_server import Served, serve


class NoProgress:
    def pass_began(self, asked: Pass) -> None: ...

    def calibration_ended(self, config: str, found: Calibration) -> None: ...

    def stage_began(self, stage: Stage, questions: int) -> None: ...

    def stage_ended(self, stage: Stage) -> None: ...


def run(served: Served, **changes: Any) -> list[Stage]:
    chosen = scenario(**changes)
    task = load_task(chosen.task)

    async def run_all() -> list[Stage]:
        async with Client(served.url, None, chosen.limits) as client:
            return await Runner(chosen, "mock", task, client, NoProgress(), Records(Path(folder), {}, "refuse")).run()

    try:
        with tempfile.TemporaryDirectory() as folder:
            return asyncio.run(run_all())
    finally:
        task.close()


def test_all_configs_have_the_same_questions_and_seeds_and_no_two_questions_share_a_seed() -> None:
    with serve() as served:
        stages = run(served)
        bodies = served.mock.bodies
    assert Counter((stage.config, stage.repetition) for stage in stages) == {(a, r): 1 for a in "ab" for r in (0, 1)}
    asked = {
        (stage.config, stage.repetition): {question.index: question.requests[0].seed for question in stage.questions}
        for stage in stages
    }
    assert asked["a", 0] == asked["b", 0]
    assert asked["a", 1] == asked["b", 1]
    seeds = [*asked["a", 0].values(), *asked["a", 1].values()]
    assert len(set(seeds)) == len(seeds) == 20
    assert len(bodies) == 4 * (10 + 3)
    warm_up = Counter(body["seed"] for body in bodies if body["seed"] not in set(seeds))
    assert sum(warm_up.values()) == 4 * 3
    assert {body.get("temperature") for body in bodies} == {None, 0.5}
    assert all(question.correct and question.answer for stage in stages for question in stage.questions)


def test_the_order_of_configs_differs_between_repetitions() -> None:
    configs = {f"config {i}": None for i in range(4)}
    with serve(tokens=1) as served:
        stages = run(served, arms=configs, repetitions=3, warmup=0, task={"type": "demo", "count": 1})
    orders = [tuple(stage.config for stage in stages[4 * i : 4 * i + 4]) for i in range(3)]
    assert all(sorted(order) == sorted(configs) for order in orders)
    assert len(set(orders)) > 1


def test_in_an_open_loop_all_configs_have_the_same_arrivals_and_repetitions_have_others() -> None:
    with serve(tokens=1) as served:
        stages = run(served, loads=[{"type": "poisson", "rate": 200}], warmup=0)
    arrivals = {
        (stage.config, stage.repetition): sorted((question.scheduled, question.index) for question in stage.questions)
        for stage in stages
    }
    assert arrivals["a", 0] == arrivals["b", 0] != arrivals["a", 1] == arrivals["b", 1]


def test_a_config_overrides_fields_and_null_removes_one() -> None:
    with serve() as served:
        request = {"temperature": 1.0, "max_tokens": 9}
        run(served, request=request, arms={"a": {"body": {"max_tokens": None, "top_p": 0.5}}}, system="Be brief.")
        body = served.mock.bodies[-1]
    assert "max_tokens" not in body
    assert (body["temperature"], body["top_p"], body["model"]) == (1.0, 0.5, "mock")
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_seed_of_null_is_not_sent_by_one_config_or_by_all() -> None:
    with serve(tokens=1) as served:
        run(served, arms={"none": {"body": {"seed": None}}, "vote": {"vote": {"n": 2}, "body": {"seed": None}}})
        assert not any("seed" in body for body in served.mock.bodies)
        stages = run(served, arms={"none": {"body": {"seed": None}}, "some": None}, warmup=0)
    for stage in stages:
        seeds = {request.seed for question in stage.questions for request in question.requests}
        assert (seeds == {None}) is (stage.config == "none")
    with serve(tokens=1) as served:
        run(served, request={"seed": None})
        assert not any("seed" in body for body in served.mock.bodies)


def test_all_seeds_fit_32_bits_those_of_the_warm_up_and_of_late_repetitions_too() -> None:
    with serve(tokens=1) as served:
        run(served, repetitions=6, arms={"a": {"vote": {"n": 2}}})
        seeds = [body["seed"] for body in served.mock.bodies]
    assert len(seeds) == 6 * 2 * (10 + 3)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_matched_temperature_is_sought_under_the_concurrency_of_the_load_and_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = Calibration(0.37, 0.2, 0.2, passes=2)

    async def find(send: Any, target: Any, bodies: Any, config: str, concurrency: int, pass_began: Any) -> Calibration:
        assert (config, concurrency, len(target), len(bodies)) == ("matched", 4, 10, 10)
        assert [body["seed"] for body in target] == [body["seed"] for body in bodies]
        assert all("em_inf" in body for body in target) and not any("em_inf" in body for body in bodies)
        return found

    ended = list[tuple[str, Calibration]]()
    monkeypatch.setattr(runner, "find_temperature", find)
    monkeypatch.setattr(NoProgress, "calibration_ended", lambda _, config, found: ended.append((config, found)))
    with serve(tokens=1) as served:
        run(served, arms={"EM": {"body": {"em_inf": {}}}, "matched": {"match_entropy_of": "EM"}}, repetitions=1)
        temperatures = {body.get("temperature") for body in served.mock.bodies if "em_inf" not in body}
    assert temperatures == {0.37}
    assert ended == [("matched", found)]


def test_a_request_that_is_not_streamed_has_no_stream_options() -> None:
    with serve(tokens=1) as served:
        run(served, request={"stream": False})
        assert not any(body["stream"] or "stream_options" in body for body in served.mock.bodies)


def test_the_servers_counters_count_the_stage_alone() -> None:
    with serve(tokens=7) as served:
        stages = run(served)
    assert {stage.counted_output_tokens for stage in stages} == {70}
    assert all(
        stage.counted_prompt_tokens
        == sum(request.prompt_tokens or 0 for question in stage.questions for request in question.requests)
        for stage in stages
    )


def test_accuracy_is_the_scripted_one_and_a_vote_is_better() -> None:
    with serve(accuracy=0.6, tokens=1) as served:
        stages = run(
            served,
            arms={"one": None, "vote": {"vote": {"n": 9}}},
            task={"type": "demo", "count": 150},
            repetitions=1,
            warmup=0,
        )
    correct = {stage.config: sum(bool(question.correct) for question in stage.questions) for stage in stages}
    assert 0.45 < correct["one"] / 150 < 0.75
    assert correct["vote"] / 150 > 0.9
    votes = next(stage for stage in stages if stage.config == "vote")
    assert all(len({request.seed for request in question.requests}) == 9 for question in votes.questions)


@pytest.mark.parametrize(
    ("sweep", "levels"),
    [
        ({"most": 4}, [1, 2, 4]),
        ({"most": 64}, [1, 2, 4, 8, 16]),
        ({"most": 64, "gain": 10.0}, [1, 2]),
    ],
)
def test_a_sweep_ends_when_more_concurrency_gives_no_more_answers(
    sweep: dict[str, Any], levels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers per second double up to a concurrency of 8, and then gain 4 %, less than the 5 % that are asked for."""
    rates = {1: 10.0, 2: 20.0, 4: 40.0, 8: 80.0, 16: 83.2, 32: 83.2, 64: 83.2}
    monkeypatch.setattr(runner, "answers_per_second", lambda stage: rates[stage.target_load])
    with serve(tokens=1) as served:
        stages = run(served, loads=[{"type": "sweep"} | sweep], repetitions=1, warmup=0, arms={"a": None})
    assert [stage.target_load for stage in stages] == levels


def test_answers_per_second_count_complete_replies() -> None:
    questions = [*measured.answered(1, 3), measured.question(measured.broken("failed", "HTTP 500"))]
    assert answers_per_second(measured.stage(*questions)) == pytest.approx(3 / 10)
    assert answers_per_second(measured.stage(*questions, seconds=0.0)) == 0


def test_a_stage_lasts_from_its_first_question_to_its_last_answer() -> None:
    """Ten questions one after another, and no longer than the test itself."""
    began = time.monotonic()
    with serve(tokens=1, first_token=0.02) as served:
        (stage,) = run(served, loads=[{"type": "closed", "concurrency": 1}], repetitions=1, warmup=0, arms={"a": None})
    # Of the 20 ms of each question, 10 are enough: the mock's timer may end a little early.
    assert 10 * 0.01 <= stage.seconds <= time.monotonic() - began


def test_a_vote_is_won_by_the_first_complete_reply_with_the_most_frequent_answer() -> None:
    find = Answer().extract
    requests = [
        MeasuredRequest(seed=i, status="ok", text=f"\\boxed{{{answer}}}") for i, answer in enumerate((3, 5, 4, 5))
    ]
    requests.append(MeasuredRequest(seed=9, status="incomplete", text="\\boxed{3}"))
    assert vote_winner(requests, find) is requests[1]
    assert vote_winner([requests[4]], find) is None
    without_answer = [MeasuredRequest(seed=1, status="ok", text="none")]
    assert vote_winner(without_answer, find) is without_answer[0]
