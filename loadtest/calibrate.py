"""The matched temperature: the single temperature whose mean entropy equals that of another config.

The target's entropy is what the server reports after EM-INF. A temperature's entropy is computed here, from the top
log-probabilities of the sampled tokens, so that any server will do.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.measurements import MeasuredRequest
from loadtest.scenario import ScenarioError

MAX_CONCURRENCY = 16
MAX_QUESTIONS = 64  # of the task
TOP_LOGPROBS = 20  # per token; the most that servers give by default
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.02, 2.0
HALVINGS = 8  # of that range, on a logarithmic scale: to within 2 %

Send = Callable[[dict[str, Any]], Awaitable[MeasuredRequest]]


@dataclass(frozen=True)
class Calibration:
    """A temperature found; entropies in nats per token."""

    temperature: float
    entropy: float  # at this temperature
    target: float  # of the config to match

    def summary(self) -> dict[str, float]:
        """Return the fields for results.json."""
        return asdict(self)


async def find_temperature(
    send: Send, target: Sequence[dict[str, Any]], bodies: Sequence[dict[str, Any]], config: str
) -> Calibration:
    """Find the temperature by bisection, sampling replies at each one that is tried, always with the same seeds.

    Args:
        send: sends the body of a request.
        target: bodies of requests of the config to match.
        bodies: bodies of requests of the config whose temperature is sought.
        config: the name of the latter, for errors.

    Raises:
        ScenarioError: if the target has no such entropy, or the server does not report what the search needs.
    """
    goal = await _target_entropy(send, target[:MAX_QUESTIONS], config)
    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    best: Calibration | None = None
    for _ in range(HALVINGS):
        temperature = round(math.exp((low + high) / 2), 4)
        entropy = await _entropy_at(send, bodies[:MAX_QUESTIONS], temperature, config)
        if best is None or abs(entropy - goal) < abs(best.entropy - goal):
            best = Calibration(temperature, entropy, goal)
        low, high = (low, math.log(temperature)) if entropy > goal else (math.log(temperature), high)
    assert best is not None
    return best


async def _target_entropy(send: Send, bodies: Sequence[dict[str, Any]], config: str) -> float:
    for body in bodies:
        settings = body.get("em_inf")
        if not isinstance(settings, dict) or body.get("temperature", 1.0) != 1.0 or body.get("strategy"):
            problem = "the config to match must have `em_inf` settings at temperature 1, and no strategy"
            raise ScenarioError(f"arms.{config}.match_entropy_of: {problem}")
    bodies = [body | {"em_inf": {**body["em_inf"], "stats": "summary"}} for body in bodies]
    summaries = [reply.em_inf for reply in await _send_all(send, bodies)]
    known = [summary for summary in summaries if summary and summary.get("entropy_after") is not None]
    tokens = sum(summary.get("tokens") or 0 for summary in known)
    if not tokens:
        raise ScenarioError(f"arms.{config}.match_entropy_of: the server reports no entropies (`em_inf` with `stats`)")
    return float(sum(summary["entropy_after"] * (summary.get("tokens") or 0) for summary in known) / tokens)


async def _entropy_at(send: Send, bodies: Sequence[dict[str, Any]], temperature: float, config: str) -> float:
    extra = {"temperature": temperature, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
    entropies = [
        tempered_entropy(logprobs, temperature)
        for reply in await _send_all(send, [body | extra for body in bodies])
        for logprobs in reply.top_logprobs
        if logprobs
    ]
    if not entropies:
        raise ScenarioError(f"arms.{config}.match_entropy_of: the server returns no `top_logprobs`; they are needed")
    return sum(entropies) / len(entropies)


async def _send_all(send: Send, bodies: Sequence[dict[str, Any]]) -> list[MeasuredRequest]:
    slots = asyncio.Semaphore(MAX_CONCURRENCY)

    async def one(body: dict[str, Any]) -> MeasuredRequest:
        async with slots:
            return await send({**body, "stream": False, "stream_options": None})

    return list(await asyncio.gather(*(one(body) for body in bodies)))


def tempered_entropy(logprobs: Sequence[float], temperature: float) -> float:
    """Return the entropy at a temperature, in nats, over candidates given by their log-probabilities at 1."""
    scaled = [value / temperature for value in logprobs]
    top = max(scaled)
    weights = [math.exp(value - top) for value in scaled]
    total = sum(weights)
    mean = sum(weight * (value - top) for weight, value in zip(weights, scaled, strict=True)) / total
    return math.log(total) - mean
