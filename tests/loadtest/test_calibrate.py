"""The temperature of equal entropy, on a model whose logits are known."""

import asyncio
import math
import random
from typing import Any

import pytest

from loadtest.calibrate import find_temperature, tempered_entropy
from loadtest.records import Call
from loadtest.scenario import ScenarioError

RNG = random.Random(3)
LOGITS = [[RNG.gauss(0, 2) for _ in range(12)] for _ in range(30)]


def entropy(logits: list[float], temperature: float) -> float:
    weights = [math.exp(value / temperature) for value in logits]
    shares = [weight / sum(weights) for weight in weights]
    return -sum(share * math.log(share) for share in shares)


def model(goal: float, **missing: bool) -> Any:
    """A server: one token per reply, whose candidates are `LOGITS`; after EM-INF its mean entropy is `goal`."""

    async def ask(body: dict[str, Any]) -> Call:
        call = Call(seed=body["seed"])
        if body.get("em_inf") and "em_inf" not in missing:
            assert body["em_inf"]["stats"] == "summary"
            call.em_inf = {"tokens": 1, "entropy_after": goal}
        if body.get("logprobs") and "logprobs" not in missing:
            row = LOGITS[body["seed"]]
            total = math.log(sum(map(math.exp, row)))
            call.top_logprobs = [[value - total for value in row]]
        assert body["stream"] is False
        return call

    return ask


TARGET = [{"seed": i, "temperature": 1.0, "em_inf": {"threshold": 0.3}} for i in range(30)]
BODIES = [{"seed": i} for i in range(30)]


def test_the_entropy_of_a_temperature() -> None:
    for row in LOGITS[:5]:
        for temperature in (0.05, 0.5, 1.0, 3.0):
            assert tempered_entropy(row, temperature) == pytest.approx(entropy(row, temperature), abs=1e-9)
    assert tempered_entropy([0.0, -9999.0], 0.01) == 0


@pytest.mark.parametrize("temperature", [0.1, 0.35, 0.8, 1.5])
def test_it_is_found(temperature: float) -> None:
    goal = sum(entropy(row, temperature) for row in LOGITS) / len(LOGITS)
    found = asyncio.run(find_temperature(model(goal), TARGET, BODIES, "matched"))
    assert found.temperature == pytest.approx(temperature, rel=0.03)
    assert found.entropy == pytest.approx(goal, abs=0.02)
    assert found.target == pytest.approx(goal)


def test_what_it_cannot_do_without() -> None:
    with pytest.raises(ScenarioError, match=r"arms\.matched\.match_entropy_of: the server reports no entropies"):
        asyncio.run(find_temperature(model(0.1, em_inf=True), TARGET, BODIES, "matched"))
    with pytest.raises(ScenarioError, match="top_logprobs"):
        asyncio.run(find_temperature(model(0.1, logprobs=True), TARGET, BODIES, "matched"))
    for wrong in ({"temperature": 0.5}, {"em_inf": None}, {"em_inf": True}, {"strategy": {"type": "refinement"}}):
        with pytest.raises(ScenarioError, match="temperature 1"):
            asyncio.run(find_temperature(model(0.1), [TARGET[0] | wrong], BODIES, "matched"))
