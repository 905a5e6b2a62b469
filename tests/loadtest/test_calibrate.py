"""The matched temperature, on models with known logits whose replies change with the temperature."""

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.calibrate import (
    DEFAULT_CONCURRENCY,
    MAX_PASSES,
    MAX_QUESTIONS,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    TOLERANCE,
    TOP_LOGPROBS,
    Calibration,
    Pass,
    calibration_concurrency,
    find_temperature,
    solve,
)
from loadtest.candidates import Candidates, Floats
from loadtest.measurements import MeasuredRequest
from loadtest.scenario import ScenarioError
from tests.loadtest.example import scenario

QUESTIONS, TOKENS, WORDS = 40, 50, 60


class Model:
    """A server whose replies are flatter, token by token, the higher the temperature at which they are made.

    Args:
        drift: by which power of the temperature the logits shrink, as they do after wrong turns.
        noise: how much of the logits each temperature draws anew.
        goal: the entropy that is reported after EM-INF.
        spread: of the logits at temperature 1.
        like: the temperature whose replies the target's are like.
    """

    def __init__(self, drift: float, noise: float, goal: float, spread: float = 4.0, like: float = 0.6) -> None:
        self.drift, self.noise, self.goal, self.spread, self.like = drift, noise, goal, spread, like
        self.without: set[str] = set()
        self.bodies: list[dict[str, Any]] = []
        self.failing: set[int] = set()

    def logprobs(self, seed: int, temperature: float) -> Floats:
        """Return the log-probabilities of all words for the tokens of a reply: [tokens, words]."""
        same, own = np.random.default_rng(seed), np.random.default_rng([seed, round(temperature * 1e4)])
        logits = same.normal(size=(TOKENS, WORDS)) + self.noise * own.normal(size=(TOKENS, WORDS))
        logits *= self.spread * same.uniform(0.2, 2.0, size=(TOKENS, 1)) * temperature**-self.drift
        return np.asarray(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))

    def entropy(self, temperature: float, of_replies_at: float | None = None) -> float:
        """Return the true mean entropy at a temperature, of replies made at it or at another one."""
        replies = [self.logprobs(seed, of_replies_at or temperature) for seed in range(QUESTIONS)]
        return float(exact_entropies(np.concatenate(replies), temperature).mean())

    async def send(self, body: dict[str, Any]) -> MeasuredRequest:
        """Answer like a server with EM-INF."""
        self.bodies.append(body)
        measured = MeasuredRequest(seed=body["seed"], status="ok")
        if body["seed"] in self.failing:
            return MeasuredRequest(seed=body["seed"])
        is_target = bool(body.get("em_inf"))
        if is_target and "em_inf" not in self.without:
            assert body["em_inf"]["stats"] == "summary"
            measured.em_inf = {"tokens": TOKENS, "entropy_after": self.goal}
        if ("target's logprobs" if is_target else "logprobs") not in self.without:
            assert body["logprobs"] is True
            all_words = self.logprobs(body["seed"], self.like if is_target else body["temperature"])
            measured.top_logprobs = likeliest(all_words, body["top_logprobs"])
        return measured


TARGET = [{"seed": i, "temperature": 1.0, "em_inf": {"threshold": 0.3}} for i in range(QUESTIONS)]
BODIES = [{"seed": i} for i in range(QUESTIONS)]


def exact_entropies(logprobs: Floats, temperature: float) -> Floats:
    weights = np.exp((logprobs - logprobs.max(axis=1, keepdims=True)) / temperature)
    shares = weights / weights.sum(axis=1, keepdims=True)
    return np.asarray(-(shares * np.log(np.maximum(shares, 1e-300))).sum(axis=1))


def likeliest(logprobs: Floats, count: int) -> list[list[float]]:
    return [list(row) for row in -np.sort(-logprobs, axis=1)[:, :count]]


def find(model: Model, **changes: Any) -> Calibration:
    return asyncio.run(find_temperature(model.send, TARGET, BODIES, "matched", **changes))


# ---- Entropies from candidates


def test_the_entropy_of_all_candidates_is_that_of_the_softmax_at_the_temperature() -> None:
    rows = Model(0.0, 0.0, 0.0).logprobs(3, 1.0)
    for temperature in (0.05, 0.5, 1.0, 3.0):
        found = Candidates(rows.tolist()).entropies(temperature)
        assert found == pytest.approx(exact_entropies(rows, temperature), abs=1e-9)
    assert Candidates([[0.0, -9999.0]]).mean_entropy(0.01) == 0


def test_tokens_without_candidates_do_not_count_and_others_may_have_different_numbers_of_them() -> None:
    candidates = Candidates([[], [math.log(0.5)] * 2, [math.log(0.25)] * 4])
    assert len(candidates) == 2
    assert candidates.mean_entropy(0.7) == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert len(Candidates([[], []])) == 0


@pytest.mark.parametrize("temperature", [0.6, 0.8, 1.0])
def test_what_the_candidates_leave_out_is_estimated(temperature: float) -> None:
    """Flat distributions over 60 words, of which 20 are listed: without the rest their entropy is far too low."""
    rows = Model(0.0, 0.0, 0.0, spread=0.8).logprobs(3, 1.0)
    listed = likeliest(rows, TOP_LOGPROBS)
    truth, cut = (exact_entropies(np.asarray(of), temperature).mean() for of in (rows, listed))
    estimated = Candidates(listed).mean_entropy(temperature)
    assert abs(estimated - truth) < abs(cut - truth) / 3
    assert estimated == pytest.approx(truth, rel=0.06)


@given(
    st.lists(st.lists(st.floats(-1e12, 1), min_size=1, max_size=20), min_size=1, max_size=5),
    st.floats(MIN_TEMPERATURE, MAX_TEMPERATURE),
)
def test_any_log_probabilities_have_an_entropy(rows: list[list[float]], temperature: float) -> None:
    assert 0 <= Candidates(rows).mean_entropy(temperature) < 30


# ---- The search


@pytest.mark.parametrize("temperature", [0.1, 0.35, 0.7])
def test_if_replies_do_not_change_the_first_pass_is_the_last(temperature: float) -> None:
    model = Model(drift=0.0, noise=0.0, goal=0.0)
    model.goal = model.entropy(temperature)
    found = find(model)
    assert (found.passes, found.within_tolerance, found.incomplete) == (1, True, 0)
    assert found.temperature == pytest.approx(temperature, rel=0.02)
    assert found.target == pytest.approx(model.goal)
    assert len(model.bodies) == 2 * QUESTIONS


@pytest.mark.parametrize("drift", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("temperature", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("like", [0.45, 0.6, 1.0, None])
def test_replies_that_change_with_the_temperature_are_matched_in_three_passes(
    drift: float, temperature: float, like: float | None
) -> None:
    """The goal is the true entropy at a temperature, on replies made at it; the target's replies are like others."""
    model = Model(drift, noise=0.01, goal=0.0, like=like or 1.0)
    model.goal = model.entropy(temperature)
    if like is None:
        model.without = {"target's logprobs"}
    found = find(model)
    assert found.within_tolerance and found.passes <= MAX_PASSES
    assert len(model.bodies) == (1 + found.passes) * QUESTIONS
    assert model.entropy(found.temperature) == pytest.approx(model.goal, rel=TOLERANCE), found


@given(drift=st.floats(0, 0.8), temperature=st.floats(0.35, 1.0), like=st.floats(0.5, 1.0))
@settings(max_examples=15)
def test_any_temperature_is_matched(drift: float, temperature: float, like: float) -> None:
    model = Model(drift, noise=0.0, goal=0.0, like=like)
    model.goal = model.entropy(temperature)
    assert find(model).within_tolerance


def test_each_pass_has_the_same_seeds_and_nothing_else_differs_but_the_temperature() -> None:
    model = Model(1.0, 0.03, 0.6, like=1.0)
    passes: list[Pass] = []
    found = find(model, pass_began=passes.append)
    assert [asked.number for asked in passes] == list(range(found.passes + 1))
    assert [asked.temperature for asked in passes[:1]] == [None]
    assert found.temperature in [asked.temperature for asked in passes]
    for asked in passes:
        assert (asked.config, asked.questions, len(asked.replies)) == ("matched", QUESTIONS, QUESTIONS)
        bodies = [body for body in model.bodies if body["temperature"] == (asked.temperature or 1.0)]
        assert sorted(body["seed"] for body in bodies) == list(range(QUESTIONS))
        assert (
            len({str(sorted(body.items() - {("seed", body["seed"])})) for body in bodies if "em_inf" not in body}) <= 1
        )


@pytest.mark.parametrize(("goal", "temperature"), [(0.0, MIN_TEMPERATURE), (5.0, MAX_TEMPERATURE)])
def test_a_goal_out_of_reach_gives_the_nearest_temperature_and_says_so(goal: float, temperature: float) -> None:
    """No distribution over 60 words has 5 nats; at the lowest temperature of these an entropy is left."""
    model = Model(0.0, 0.0, goal)
    found = find(model)
    assert found.temperature == temperature
    assert not found.within_tolerance
    assert found.passes == 1, "another pass would be at the same temperature"
    assert found.summary() == {
        "temperature": temperature,
        "entropy": found.entropy,
        "target": goal,
        "passes": 1,
        "incomplete": 0,
        "within_tolerance": False,
    }


def test_a_target_without_entropy_is_met_by_a_temperature_without_any() -> None:
    assert Calibration(0.02, 0.00005, 0.0).within_tolerance
    assert Calibration(0.5, 1.029, 1.0).within_tolerance and not Calibration(0.5, 1.031, 1.0).within_tolerance


def test_replies_that_are_not_complete_are_counted() -> None:
    model = Model(0.0, 0.0, 0.4)
    model.failing = {3, 4}
    found = find(model)
    assert found.incomplete == 2 * (found.passes + 1)


def test_at_most_so_many_requests_are_in_flight_and_a_pass_is_observed_as_it_goes() -> None:
    model = Model(0.0, 0.0, 0.4)
    in_flight, most, seen = 0, 0, list[int]()
    passes: list[Pass] = []

    async def send(body: dict[str, Any]) -> MeasuredRequest:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0)
        seen.append(len(passes[-1].replies))
        in_flight -= 1
        return await model.send(body)

    asyncio.run(find_temperature(send, TARGET, BODIES, "matched", 5, passes.append))
    assert most == 5
    assert max(seen[:QUESTIONS]) > QUESTIONS / 2


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([{"type": "closed", "concurrency": 4}, {"type": "closed", "concurrency": 32}], 32),
        ([{"type": "closed", "concurrency": 1}], 1),
        ([{"type": "closed", "concurrency": 1000}], MAX_QUESTIONS),
        ([{"type": "poisson", "rate": 2}], DEFAULT_CONCURRENCY),
    ],
)
def test_a_pass_has_as_many_requests_in_flight_as_the_largest_closed_load(
    loads: list[dict[str, Any]], expected: int
) -> None:
    assert calibration_concurrency(scenario(loads=loads)) == expected


def test_an_equation_is_solved_and_without_a_solution_the_end_of_the_range_is_nearest() -> None:
    assert solve(lambda temperature: temperature**2, 0.25) == pytest.approx(0.5, rel=3e-4)
    assert solve(lambda temperature: temperature, -1) == pytest.approx(1e-3, rel=1e-3)
    assert solve(lambda temperature: temperature, 1e9) == pytest.approx(100, rel=1e-3)


def test_errors_name_what_the_search_needs() -> None:
    model = Model(0.0, 0.0, 0.1)
    model.without = {"em_inf"}
    with pytest.raises(ScenarioError, match=r"arms\.matched\.match_entropy_of: the server reports no entropies"):
        find(model)
    model.without = {"logprobs"}
    with pytest.raises(ScenarioError, match="top_logprobs"):
        find(model)
    for wrong in ({"temperature": 0.5}, {"em_inf": None}, {"em_inf": True}, {"strategy": {"type": "refinement"}}):
        with pytest.raises(ScenarioError, match="temperature 1"):
            asyncio.run(find_temperature(model.send, [TARGET[0] | wrong], BODIES, "matched"))
