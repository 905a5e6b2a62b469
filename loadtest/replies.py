"""Reads a reply, streamed or not, into a `MeasuredRequest`. No input or output.

Whatever a server sends gives a measured request or a ValueError. What the OpenAI clients accept is accepted.
"""

from typing import Any

from loadtest.events import Event, EventDecoder
from loadtest.inputs import one_line, parse_json, shortened
from loadtest.measurements import MeasuredRequest

MAX_MESSAGE = 300  # characters of a server's error message
MAX_NUMBER = 10**12  # no count and no entropy is higher
STATS = ("tokens", "missing", "optimized_tokens", "entropy_before", "entropy_after")  # the numbers that are used


class StreamedReply:
    """Reads the pieces of a stream as they arrive."""

    def __init__(self, measured: MeasuredRequest) -> None:
        self.measured = measured
        self.parts: list[str] = []  # of the text
        self.done = False  # whether [DONE] came, or an error: what follows does not count
        self._decoder = EventDecoder()
        self._previous: float | None = None

    def receive(self, piece: bytes, now: float) -> None:
        """Read a piece that arrived at `now`.

        Raises:
            ValueError: if it is no part of a chat completion.
        """
        for event in self._decoder.feed(piece):
            self._read(event, now)

    def end(self, now: float) -> None:
        """Read what is left when the connection has ended properly.

        Without [DONE], a reply is complete if it has a finish_reason, as it is for the OpenAI clients.

        Raises:
            ValueError: if it is no part of a chat completion.
        """
        for event in self._decoder.end():
            self._read(event, now)
        if self.done:
            return
        if self.measured.finish_reason is None:
            self.measured.error = "broke off: the stream ended without finish_reason and without [DONE]"
        self.measured.without_done = True

    def _read(self, event: Event, now: float) -> None:
        if self.done:
            return
        data = event.data.strip()
        if data.startswith(b"[DONE]"):
            self.done = True
        elif data:
            self._read_chunk(_object(data, "an event"), event, now)

    def _read_chunk(self, chunk: dict[str, Any], event: Event, now: float) -> None:
        if chunk.get("error") or event.type == b"error" or "error" in (chunk.get("object"), chunk.get("type")):
            self.measured.error = f"error in the stream: {error_message(event.data)}"
            self.done = True
            return
        _read_metadata(chunk, self.measured)
        choice = _choice(chunk)  # None in an event of another kind, such as {"type": "ping"}
        if choice is None:
            return
        self.measured.finish_reason = _finish_reason(choice) or self.measured.finish_reason
        self.measured.top_logprobs += _candidates(choice)
        delta = _part(choice, "delta")
        content = _text(delta.get("content"))
        if content or delta.get("reasoning_content") or delta.get("reasoning"):
            self._count(content, now)

    def _count(self, content: str, now: float) -> None:
        measured = self.measured
        self.parts.append(content)
        measured.chunks += 1
        if self._previous is None:
            measured.first = now
        else:
            measured.gaps.append(round(now - self._previous, 5))
        self._previous = now


def read_reply(body: bytes, measured: MeasuredRequest) -> None:
    """Read a reply that was not streamed.

    Raises:
        ValueError: if it is no chat completion.
    """
    reply = _object(body, "the reply")
    if reply.get("error"):
        measured.error = f"error: {error_message(body)}"
        return
    _read_metadata(reply, measured)
    choice = _choice(reply)
    if choice is None:
        raise ValueError("the reply has no choices")
    measured.text = _text(_part(choice, "message").get("content"))
    measured.finish_reason = _finish_reason(choice)
    measured.top_logprobs = _candidates(choice)


def set_status(measured: MeasuredRequest) -> None:
    """Set the status, and the number of tokens of the reply itself."""
    if measured.error is None and measured.finish_reason is not None:
        measured.status = "ok"
    else:
        measured.status = "incomplete" if measured.chunks else "failed"
        measured.error = measured.error or "no finish_reason: the reply has no end"
    if measured.strategy is None and measured.output_tokens is not None:
        measured.delivered_tokens = measured.output_tokens
    else:  # one of several samples was delivered; without stats, count chunks: each has a token or a few
        measured.delivered_tokens = (measured.em_inf or {}).get("tokens") or measured.chunks or None


def error_message(body: bytes) -> str:
    """Return the server's error message in one line, shortened."""
    try:
        content = parse_json(body)
        error = content.get("error", content) if isinstance(content, dict) else content
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError):
        text = body.decode(errors="replace")
    return one_line(str(text)[: 10 * MAX_MESSAGE])[:MAX_MESSAGE]


# ---- Parts of a reply


def _object(data: bytes, what: str) -> dict[str, Any]:
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no JSON object: {shortened(value)}")
    return value


def _choice(chunk: dict[str, Any]) -> dict[str, Any] | None:
    """Return the only choice of a reply or chunk; None without choices."""
    choices = chunk.get("choices")
    if choices is None or choices == []:
        return None
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise ValueError(f"choices: got {shortened(choices)}; must be a list of objects")
    if len(choices) > 1 or choices[0].get("index") not in (None, 0):
        raise ValueError("the server sends several replies; only one can be measured")
    return choices[0]


def _part(of: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an object inside another, empty if it is missing or null."""
    value = of.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name}: got {shortened(value)}; must be an object")
    return value


def _text(content: object) -> str:
    """Return content, which some servers send as a list of parts."""
    if isinstance(content, list):
        return "".join(_text(part.get("text")) for part in content if isinstance(part, dict))
    if content is not None and not isinstance(content, str):
        raise ValueError(f"content: got {shortened(content)}; must be text")
    return content or ""


def _finish_reason(choice: dict[str, Any]) -> str | None:
    reason = choice.get("finish_reason")
    return reason if isinstance(reason, str) and reason else None


def _read_metadata(event: dict[str, Any], measured: MeasuredRequest) -> None:
    """Take usage, stats and strategy from a reply, or from a chunk of it; what is not as expected was not sent."""
    usage, summaries, strategy = event.get("usage"), event.get("em_inf"), event.get("strategy")
    if isinstance(usage, dict):
        measured.prompt_tokens = _count(usage.get("prompt_tokens"))
        measured.output_tokens = _count(usage.get("completion_tokens"))
    if isinstance(summaries, list) and summaries and isinstance(summaries[0], dict):
        measured.em_inf = {name: value for name, value in summaries[0].items() if _is_summary(name, value)}
    if isinstance(strategy, dict):
        measured.strategy = strategy


def _count(value: Any) -> int | None:
    """Return a number of tokens; None if it is none."""
    return int(value) if _is_number(value) and value >= 0 and value == int(value) else None


def _is_summary(name: str, value: object) -> bool:
    """Return whether a value of the stats is kept: lists are per token, and a number must be one."""
    if name not in STATS:
        return not isinstance(value, list)
    if name.startswith("entropy"):
        return _is_number(value)
    return _count(value) is not None


def _candidates(choice: dict[str, Any]) -> list[list[float]]:
    """Return the log-probabilities of each token's likeliest candidates, as far as the server sent any."""
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    return [_top_logprobs(token) for token in tokens] if isinstance(tokens, list) else []


def _top_logprobs(token: object) -> list[float]:
    """Return the log-probabilities of a token's likeliest candidates, which are at most 0 up to rounding."""
    found = token.get("top_logprobs") if isinstance(token, dict) else None
    listed = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    values: list[Any] = [one.get("logprob") for one in listed]
    return [float(value) for value in values if _is_number(value) and value <= 1]


def _is_number(value: Any) -> bool:
    """Return whether a value is a number of a sensible size; NaN and infinity are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
