"""The matched temperature, on a model with known logits."""

import asyncio
import math
import random
from typing import Any

import pytest

from loadtest.calibrate import find_temperature, tempered_entropy
from loadtest.measurements import MeasuredRequest
from loadtest.scenario import ScenarioError

RNG = random.Random(3)
LOGITS = [[RNG.gauss(0, 2) for _ in range(12)] for _ in range(30)]


def entropy(logits: list[float], temperature: float) -> float:
    weights = [math.exp(value / temperature) for value in logits]
    shares = [weight / sum(weights) for weight in weights]
    return -sum(share * math.log(share) for share in shares)


def model(goal: float, **missing: bool) -> Any:
    """Return a server: one token per reply, with candidates from `LOGITS`; after EM-INF its mean entropy is `goal`."""

    async def send(body: dict[str, Any]) -> MeasuredRequest:
        measured = MeasuredRequest(seed=body["seed"])
        if body.get("em_inf") and "em_inf" not in missing:
            assert body["em_inf"]["stats"] == "summary"
            measured.em_inf = {"tokens": 1, "entropy_after": goal}
        if body.get("logprobs") and "logprobs" not in missing:
            row = LOGITS[body["seed"]]
            total = math.log(sum(map(math.exp, row)))
            measured.top_logprobs = [[value - total for value in row]]
        assert body["stream"] is False
        return measured

    return send


TARGET = [{"seed": i, "temperature": 1.0, "em_inf": {"threshold": 0.3}} for i in range(30)]
BODIES = [{"seed": i} for i in range(30)]


def test_tempered_entropy_is_that_of_the_softmax_at_the_temperature() -> None:
    for row in LOGITS[:5]:
        for temperature in (0.05, 0.5, 1.0, 3.0):
            assert tempered_entropy(row, temperature) == pytest.approx(entropy(row, temperature), abs=1e-9)
    assert tempered_entropy([0.0, -9999.0], 0.01) == 0


@pytest.mark.parametrize("temperature", [0.1, 0.35, 0.8, 1.5])
def test_the_matched_temperature_is_found(temperature: float) -> None:
    goal = sum(entropy(row, temperature) for row in LOGITS) / len(LOGITS)
    found = asyncio.run(find_temperature(model(goal), TARGET, BODIES, "matched"))
    assert found.temperature == pytest.approx(temperature, rel=0.03)
    assert found.entropy == pytest.approx(goal, abs=0.02)
    assert found.target == pytest.approx(goal)


def test_errors_name_what_the_search_needs() -> None:
    with pytest.raises(ScenarioError, match=r"arms\.matched\.match_entropy_of: the server reports no entropies"):
        asyncio.run(find_temperature(model(0.1, em_inf=True), TARGET, BODIES, "matched"))
    with pytest.raises(ScenarioError, match="top_logprobs"):
        asyncio.run(find_temperature(model(0.1, logprobs=True), TARGET, BODIES, "matched"))
    for wrong in ({"temperature": 0.5}, {"em_inf": None}, {"em_inf": True}, {"strategy": {"type": "refinement"}}):
        with pytest.raises(ScenarioError, match="temperature 1"):
            asyncio.run(find_temperature(model(0.1), [TARGET[0] | wrong], BODIES, "matched"))
