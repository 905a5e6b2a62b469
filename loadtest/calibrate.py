"""The matched temperature: the single temperature whose mean entropy equals that of another config.

The target's entropy is what the server reports after EM-INF. A temperature's entropy is computed here, from the top
log-probabilities of the sampled tokens, so that any server will do.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loadtest.candidates import Candidates
from loadtest.measurements import MeasuredRequest
from loadtest.scenario import Closed, Scenario, ScenarioError

MAX_PASSES = 3  # of the config whose temperature is sought
TOLERANCE = 0.03  # share of the target's entropy
MIN_DIFFERENCE = 1e-4  # nats; a smaller one is none, even from a target of 0
MAX_QUESTIONS = 64  # of the task, in each pass
DEFAULT_CONCURRENCY = 16  # without a closed load
TOP_LOGPROBS = 20  # per token; the most that servers give by default
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.02, 2.0
SOLVED = 1e-3, 100.0  # the range in which equations are solved: on the same replies, it is farther to a temperature
HALVINGS = 16  # of that range, on a logarithmic scale: to within 0.02 %
DIGITS = 4  # of a temperature, after the point
FIRST_TEMPERATURE = 0.6  # if the target's replies have no log-probabilities to begin from
# How many times as far the temperature would have to move on the same replies: they change with it, and add to what it
# does. Expected before two passes show it, and the most that is believed of two noisy passes.
EXPECTED_STRETCH, MAX_STRETCH = 1.3, 4.0

Send = Callable[[dict[str, Any]], Awaitable[MeasuredRequest]]


@dataclass(frozen=True)
class Calibration:
    """A temperature found; entropies in nats per token."""

    temperature: float
    entropy: float  # at this temperature
    target: float  # of the config to match
    passes: int = 0  # that were needed, without the target's; 0: an old record, which has no number
    incomplete: int = 0  # replies of all passes, with the target's

    @property
    def within_tolerance(self) -> bool:
        """Whether the entropy is close enough to the target's."""
        return abs(self.entropy - self.target) <= max(TOLERANCE * self.target, MIN_DIFFERENCE)

    def summary(self) -> dict[str, float | bool]:
        """Return the fields for results.json."""
        return asdict(self) | {"within_tolerance": self.within_tolerance}


@dataclass
class Pass:
    """Some questions asked once with one config; what observes it reads `replies`, to which each is added."""

    config: str  # whose temperature is sought
    number: int  # 0: the config to match is asked
    temperature: float | None  # None: as the config to match has it
    questions: int
    replies: list[MeasuredRequest] = field(default_factory=list)

    @property
    def candidates(self) -> Candidates:
        """The candidates of all tokens of the replies."""
        return Candidates(token for reply in self.replies for token in reply.top_logprobs)


@dataclass(frozen=True)
class Point:
    """The entropy measured at a temperature, and the candidates from which it can be estimated at others."""

    temperature: float
    entropy: float
    candidates: Candidates


async def find_temperature(
    send: Send,
    target: Sequence[dict[str, Any]],
    bodies: Sequence[dict[str, Any]],
    config: str,
    concurrency: int = DEFAULT_CONCURRENCY,
    pass_began: Callable[[Pass], None] = lambda _: None,
) -> Calibration:
    """Find the temperature in at most `MAX_PASSES`, always with the same seeds.

    Args:
        send: sends the body of a request.
        target: bodies of requests of the config to match.
        bodies: bodies of requests of the config whose temperature is sought.
        config: the name of the latter, for errors.
        concurrency: how many requests are in flight.
        pass_began: receives each pass, the target's too, before it is asked.

    Raises:
        ScenarioError: if the target has no such entropy, or the server does not report what the search needs.
    """
    search = _Search(send, config, concurrency, pass_began)
    goal, temperature = await search.target(target[:MAX_QUESTIONS])
    points: list[Point] = []
    while len(points) < MAX_PASSES and temperature not in [point.temperature for point in points]:
        points.append(await search.measure(bodies[:MAX_QUESTIONS], temperature, len(points) + 1))
        found = search.found(points, goal)
        if found.within_tolerance:
            break
        temperature = _next_temperature(points, goal)
    return found


def calibration_concurrency(scenario: Scenario) -> int:
    """Return how many requests a pass has in flight: as many as the largest closed load, for its time and batches."""
    levels = [load.concurrency for load in scenario.loads if isinstance(load, Closed)]
    return min(max(levels, default=DEFAULT_CONCURRENCY), MAX_QUESTIONS)


class _Search:
    """Asks the passes of one calibration."""

    def __init__(self, send: Send, config: str, concurrency: int, pass_began: Callable[[Pass], None]) -> None:
        self.send = send
        self.config = config
        self.concurrency = concurrency
        self.pass_began = pass_began
        self.incomplete = 0

    async def target(self, bodies: Sequence[dict[str, Any]]) -> tuple[float, float]:
        """Return the target's entropy, and the temperature that has it on the target's own replies."""
        bodies = list(self._with_stats(bodies))
        asked = await self._ask(bodies, Pass(self.config, 0, None, len(bodies)))
        known = [reply.em_inf for reply in asked.replies if reply.em_inf]
        known = [summary for summary in known if summary.get("entropy_after") is not None]
        tokens = sum(summary.get("tokens") or 0 for summary in known)
        if not tokens:
            raise self._error("the server reports no entropies (`em_inf` with `stats`)")
        goal = sum(summary["entropy_after"] * (summary.get("tokens") or 0) for summary in known) / tokens
        candidates = asked.candidates
        return goal, _allowed(solve(candidates.mean_entropy, goal)) if len(candidates) else FIRST_TEMPERATURE

    async def measure(self, bodies: Sequence[dict[str, Any]], temperature: float, number: int) -> Point:
        """Ask all bodies at a temperature."""
        bodies = [body | {"temperature": temperature} for body in bodies]
        asked = await self._ask(bodies, Pass(self.config, number, temperature, len(bodies)))
        candidates = asked.candidates
        if not len(candidates):
            raise self._error("the server returns no `top_logprobs`; they are needed")
        return Point(temperature, candidates.mean_entropy(temperature), candidates)

    def found(self, points: Sequence[Point], goal: float) -> Calibration:
        """Return the best of the passes so far."""
        best = _closest(points, goal)
        return Calibration(best.temperature, best.entropy, goal, len(points), self.incomplete)

    def _with_stats(self, bodies: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for body in bodies:
            settings = body.get("em_inf")
            if not isinstance(settings, dict) or body.get("temperature", 1.0) != 1.0 or body.get("strategy"):
                raise self._error("the config to match must have `em_inf` settings at temperature 1, and no strategy")
            yield body | {"em_inf": {**settings, "stats": "summary"}}

    async def _ask(self, bodies: Sequence[dict[str, Any]], asked: Pass) -> Pass:
        """Send the bodies of a pass, streamed or not as those of a stage are: limits of time are the same."""
        slots = asyncio.Semaphore(self.concurrency)
        self.pass_began(asked)

        async def one(body: dict[str, Any]) -> None:
            async with slots:
                asked.replies.append(await self.send(body | {"logprobs": True, "top_logprobs": TOP_LOGPROBS}))

        await asyncio.gather(*(one(body) for body in bodies))
        self.incomplete += sum(reply.status != "ok" for reply in asked.replies)
        return asked

    def _error(self, problem: str) -> ScenarioError:
        return ScenarioError(f"arms.{self.config}.match_entropy_of: {problem}")


# ---- Where to look next


def _closest(points: Sequence[Point], goal: float) -> Point:
    """Return the point whose entropy differs least, as a share of the higher one."""

    def share(point: Point) -> float:
        return abs(point.entropy - goal) / max(point.entropy, goal, MIN_DIFFERENCE)

    return min(points, key=share)


def _next_temperature(points: Sequence[Point], goal: float) -> float:
    """Return the temperature at which the entropy should be `goal`, seen from the closest point."""
    closest = _closest(points, goal)
    distance = _distance(closest, goal) / _stretch(points, closest)
    return _allowed(closest.temperature * math.exp(distance))


def _stretch(points: Sequence[Point], closest: Point) -> float:
    """Return how many times as far another point's entropy is on the closest point's replies."""
    others = [point for point in points if point is not closest]
    if not others:
        return EXPECTED_STRETCH
    distance = math.log(others[-1].temperature / closest.temperature)
    return min(max(_distance(closest, others[-1].entropy) / distance, 1.0), MAX_STRETCH)


def _distance(point: Point, entropy: float) -> float:
    """Return how far from a point's temperature its replies have an entropy, on a logarithmic scale."""
    return math.log(solve(point.candidates.mean_entropy, entropy) / point.temperature)


def _allowed(temperature: float) -> float:
    """Return the nearest temperature that is tried."""
    return round(min(max(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE), DIGITS)


def solve(entropy: Callable[[float], float], goal: float) -> float:
    """Return the temperature within `SOLVED` at which an entropy that rises with it is nearest to `goal`."""
    low, high = map(math.log, SOLVED)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if entropy(math.exp(middle)) > goal else (middle, high)
    return math.exp((low + high) / 2)
