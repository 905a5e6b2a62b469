"""The baseline that reviewers ask for: the single temperature whose mean entropy equals another arm's.

The entropy of a temperature is computed from the top log-probabilities of a reply's own tokens, so that any server will
do; the target's is what the server reports after EM-INF.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.records import Call
from loadtest.scenario import ScenarioError

AT_A_TIME = 16
QUESTIONS = 64  # at most, of the task
TOP = 20  # log-probabilities asked for at each token; the most that servers give by default
LOWEST, HIGHEST = 0.02, 2.0  # temperatures
STEPS = 8  # halvings of that range, on a logarithmic scale: to within 2 %

Ask = Callable[[dict[str, Any]], Awaitable[Call]]


@dataclass(frozen=True)
class Calibration:
    """What was found."""

    temperature: float
    entropy: float  # nats per token at it
    target: float  # nats per token of the arm to match

    def summary(self) -> dict[str, float]:
        """For results.json."""
        return asdict(self)


async def find_temperature(
    ask: Ask, target: Sequence[dict[str, Any]], bodies: Sequence[dict[str, Any]], arm: str
) -> Calibration:
    """Bisection; every temperature is tried on replies that were sampled at it, all with the same seeds.

    Args:
        target: requests of the arm to match.
        bodies: requests of the arm whose temperature is sought.
        arm: its name, for errors.

    Raises:
        ScenarioError: where the server does not say what is needed, or no temperature does it.
    """
    goal = await _target(ask, target[:QUESTIONS], arm)
    low, high = math.log(LOWEST), math.log(HIGHEST)
    best: Calibration | None = None
    for _ in range(STEPS):
        temperature = round(math.exp((low + high) / 2), 4)
        entropy = await _at(ask, bodies[:QUESTIONS], temperature, arm)
        if best is None or abs(entropy - goal) < abs(best.entropy - goal):
            best = Calibration(temperature, entropy, goal)
        low, high = (low, math.log(temperature)) if entropy > goal else (math.log(temperature), high)
    assert best is not None
    return best


async def _target(ask: Ask, bodies: Sequence[dict[str, Any]], arm: str) -> float:
    for body in bodies:
        settings = body.get("em_inf")
        if not isinstance(settings, dict) or body.get("temperature", 1.0) != 1.0 or body.get("strategy"):
            problem = "the arm to match must have `em_inf` settings at temperature 1, and no strategy"
            raise ScenarioError(f"arms.{arm}.match_entropy_of: {problem}")
    bodies = [body | {"em_inf": {**body["em_inf"], "stats": "summary"}} for body in bodies]
    found = [
        call.em_inf for call in await _all(ask, bodies) if call.em_inf and call.em_inf.get("entropy_after") is not None
    ]
    tokens = sum(each["tokens"] for each in found)
    if not tokens:
        raise ScenarioError(f"arms.{arm}.match_entropy_of: the server reports no entropies (`em_inf` with `stats`)")
    return float(sum(each["entropy_after"] * each["tokens"] for each in found) / tokens)


async def _at(ask: Ask, bodies: Sequence[dict[str, Any]], temperature: float, arm: str) -> float:
    extra = {"temperature": temperature, "logprobs": True, "top_logprobs": TOP}
    entropies = [
        tempered_entropy(row, temperature)
        for call in await _all(ask, [body | extra for body in bodies])
        for row in call.top_logprobs
    ]
    if not entropies:
        raise ScenarioError(f"arms.{arm}.match_entropy_of: the server gives no `top_logprobs`, which the search needs")
    return sum(entropies) / len(entropies)


async def _all(ask: Ask, bodies: Sequence[dict[str, Any]]) -> list[Call]:
    places = asyncio.Semaphore(AT_A_TIME)

    async def one(body: dict[str, Any]) -> Call:
        async with places:
            return await ask({**body, "stream": False, "stream_options": None})

    return list(await asyncio.gather(*(one(body) for body in bodies)))


def tempered_entropy(logprobs: Sequence[float], temperature: float) -> float:
    """Nats: of the distribution over these candidates, whose log-probabilities at temperature 1 are given."""
    scaled = [value / temperature for value in logprobs]
    top = max(scaled)
    weights = [math.exp(value - top) for value in scaled]
    total = sum(weights)
    mean = sum(weight * (value - top) for weight, value in zip(weights, scaled, strict=True)) / total
    return math.log(total) - mean
