"""What happened: one `Call` per HTTP request, one `Item` per question asked, one `Stage` per arm, load and repetition.

Times are seconds since the stage began, on one monotonic clock.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "incomplete", "failed"]  # whole; broke off after some output; none


@dataclass
class Call:
    """One HTTP request."""

    seed: int
    sent: float = 0.0
    first: float | None = None  # the first content of the reply
    last: float = 0.0  # the end, or where it broke off
    gaps: list[float] = field(default_factory=list)  # seconds between chunks with content
    chunks: int = 0  # with content
    status: Status = "failed"
    error: str | None = None  # a short kind first: "HTTP 500: ..."
    finish_reason: str | None = None
    text: str = ""
    prompt_tokens: int | None = None  # the server's `usage`; None where it gave none
    output_tokens: int | None = None  # the same: all that was generated for this request
    delivered_tokens: int | None = None  # of the reply itself; equal to output_tokens without a strategy
    em_inf: dict[str, Any] | None = None  # the first choice's statistics: entropy_before, entropy_after, tokens, ...
    strategy: dict[str, Any] | None = None
    top_logprobs: list[list[float]] = field(default_factory=list)  # of each token's likeliest, where asked for


@dataclass
class Item:
    """One question asked under one arm: one call, or several whose answers are voted on here."""

    index: int  # of the question in the task
    scheduled: float  # when it should have been asked
    calls: list[Call] = field(default_factory=list)
    reply: Call | None = None  # of its calls, the one that the user has; None where none was whole
    answer: str | None = None  # what was found in it
    correct: bool | None = None  # None where the task has no answers

    @property
    def status(self) -> Status:
        """ok where at least one call was whole (the vote goes on without the others)."""
        states = {call.status for call in self.calls}
        return "ok" if "ok" in states else "incomplete" if "incomplete" in states else "failed"

    @property
    def sent(self) -> float:
        """The first of its calls."""
        return min(call.sent for call in self.calls)

    @property
    def ended(self) -> float:
        """The last of its calls."""
        return max(call.last for call in self.calls)


@dataclass
class Stage:
    """One arm under one load, once over the task."""

    arm: str
    load: str  # its label
    offered: float  # concurrency, or questions per second
    open_loop: bool
    repetition: int
    items: list[Item] = field(default_factory=list)
    seconds: float = 0.0  # from the first question to the last answer, warm-up left out
    lags: list[float] = field(default_factory=list)  # seconds that the generator was late, by its own clock
    counted_output_tokens: int | None = None  # what the server's own counter says was generated; None without one
    counted_prompt_tokens: int | None = None
