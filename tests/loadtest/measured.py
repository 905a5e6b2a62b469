"""Builders of measurements, for tests of the figures that are computed from them."""

from typing import Any

from loadtest.measurements import MeasuredQuestion, MeasuredRequest, Stage
from loadtest.scenario import Scenario

GOOD = Scenario(
    name="test",
    task={"type": "demo"},
    arms={"plain": {}, "em": {}},
    loads=[{"type": "closed", "concurrency": 2}],
    slo={"ttft_ms": 500, "tpot_ms": 100, "e2e_ms": 2000},
    limits={"error_rate": 0.1, "lag_ms": 50},
    price_per_hour=7.2,
)


def scenario(**changes: Any) -> Scenario:
    """Return GOOD with other fields."""
    return Scenario.model_validate(GOOD.model_dump(by_alias=True) | changes)


def complete(
    sent: float = 0.0, first: float = 0.2, last: float = 1.0, tokens: int = 11, **fields: Any
) -> MeasuredRequest:
    """Return a complete request: by default TTFT 0.2 s and TPOT 0.08 s."""
    usage = {"prompt_tokens": 5, "output_tokens": tokens, "delivered_tokens": tokens, "chunks": tokens}
    return MeasuredRequest(**{"seed": 0, "sent": sent, "first": first, "last": last, "status": "ok"} | usage | fields)


def broken(status: str, error: str, **fields: Any) -> MeasuredRequest:
    """Return a request that broke off before its usage arrived."""
    return MeasuredRequest(**{"seed": 0, "status": status, "error": error, "last": 0.5} | fields)


def question(
    *requests: MeasuredRequest, index: int = 0, scheduled: float = 0.0, correct: bool | None = None
) -> MeasuredQuestion:
    """Return a question; its reply is the first complete one."""
    reply = next((request for request in requests if request.status == "ok"), None)
    return MeasuredQuestion(index, scheduled, list(requests), reply=reply, correct=correct)


def stage(*questions: MeasuredQuestion, config: str = "plain", repetition: int = 0, **fields: Any) -> Stage:
    """Return a stage of ten seconds of a closed loop."""
    fixed = {"config": config, "load": "closed 2", "target_load": 2.0, "open_loop": False, "repetition": repetition}
    return Stage(**fixed | {"questions": list(questions), "seconds": 10.0} | fields)


def answered(correct: int, asked: int, **fields: Any) -> list[MeasuredQuestion]:
    """Return `asked` questions, the first `correct` of them answered correctly."""
    return [question(complete(**fields), index=index, correct=index < correct) for index in range(asked)]
