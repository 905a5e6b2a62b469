"""What was measured: a `MeasuredRequest` per HTTP request, a `MeasuredQuestion` per question, a `Stage` per repetition.

Times are seconds since the part of the stage began, on one monotonic clock. A stage has parts if its run was resumed.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "incomplete", "failed"]  # complete; broke off after some output; no output


@dataclass
class MeasuredRequest:
    """One HTTP request and its reply. The field names are those in requests.jsonl."""

    seed: int | None  # None: the request had none
    sent: float = 0.0
    first: float | None = None  # when the first content arrived; None if the reply was not streamed
    last: float = 0.0  # when the reply ended or broke off
    gaps: list[float] = field(default_factory=list)  # seconds between chunks with content
    chunks: int = 0  # with content
    status: Status = "failed"
    error: str | None = None  # begins with a short kind: "HTTP 500: ..."
    without_done: bool = False  # the stream ended properly, but without [DONE]
    finish_reason: str | None = None
    text: str = ""
    prompt_tokens: int | None = None  # from the server's `usage`; None if it sent none
    output_tokens: int | None = None  # from `usage` too: every token generated for this request
    delivered_tokens: int | None = None  # tokens of the reply itself; equal to output_tokens without a strategy
    em_inf: dict[str, Any] | None = None  # the first choice's summary: entropy_before, entropy_after, tokens, ...
    strategy: dict[str, Any] | None = None
    top_logprobs: list[list[float]] = field(default_factory=list)  # per token, of its likeliest candidates


@dataclass
class MeasuredQuestion:
    """One question asked with one config: one request, or several whose answers are voted on by the client."""

    index: int  # of the question in the task
    scheduled: float  # when it was due
    requests: list[MeasuredRequest] = field(default_factory=list)
    reply: MeasuredRequest | None = None  # the request whose reply the user gets; None if none is complete
    answer: str | None = None  # what was found in the reply
    correct: bool | None = None  # None if the task has no answers
    part: int = 1  # of its stage, in which it was asked
    problem: str | None = None  # why the reply is not correct, if its checker says so; begins with a short kind

    @property
    def status(self) -> Status:
        """`ok` if at least one request is complete: a vote continues without the others."""
        states = {request.status for request in self.requests}
        return "ok" if "ok" in states else "incomplete" if "incomplete" in states else "failed"

    @property
    def sent(self) -> float:
        """When its first request was sent."""
        return min(request.sent for request in self.requests)

    @property
    def ended(self) -> float:
        """When its last request ended."""
        return max(request.last for request in self.requests)


@dataclass
class Stage:
    """One config under one load, once over all questions of the task."""

    config: str
    load: str  # its label
    target_load: float  # concurrency in a closed loop, questions per second in an open one
    open_loop: bool
    repetition: int
    questions: list[MeasuredQuestion] = field(default_factory=list)
    seconds: float = 0.0  # from the first question to the last answer, without the warm-up; the sum over parts
    scheduling_delays: list[float] = field(default_factory=list)  # seconds by which the generator acted late
    counted_output_tokens: int | None = None  # by the server's own counter; None if it has none
    counted_prompt_tokens: int | None = None

    @property
    def parts(self) -> int:
        """In how many parts its questions were asked: more than one if the run was broken off and resumed."""
        return len({question.part for question in self.questions})


def seconds_of(questions: Iterable[MeasuredQuestion]) -> float:
    """Return the time from the first question to the last answer, summed over parts."""
    parts: dict[int, list[MeasuredQuestion]] = defaultdict(list)
    for question in questions:
        parts[question.part].append(question)
    return sum(max(one.ended for one in part) - min(one.scheduled for one in part) for part in parts.values())
