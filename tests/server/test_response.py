"""What we add to a response is in its place, and the rest stays as vLLM wrote it."""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message

from server.response import ResponseExtras, with_extras
from server.stats import collector
from server.stats.collector import RequestStats, TokenStats

BODY = {
    "id": "chatcmpl-1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": 'Größe: {"a": 1}} ] \u2028 \n'}}],
    "usage": {"completion_tokens": 2, "prompt_tokens_details": None},
}
SUMMARY = {
    "index": 0,
    "tokens": 2,
    "optimized_tokens": 1,
    "missing": 0,
    "entropy_before": 1.25,
    "entropy_after": 0.75,
    "entropy_max": 2.0,
    "entropy_max_position": 0,
    "entropy_tail": 1.25,
    "varentropy": 0.375,
    "steps": 3,
}
PER_TOKEN = [
    {"before": 2.0, "after": 1.0, "varentropy": 0.5, "steps": 3},
    {"before": 0.5, "after": 0.5, "varentropy": 0.25, "steps": 0},
]


def final_stats(*choices: list[TokenStats]) -> RequestStats:
    """Make the final stats of a request from its choices' tokens."""
    request = RequestStats(0, "em_inf", len(choices))
    for choice, tokens in zip(request.choices, choices, strict=True):
        choice.tokens, choice.by_position = len(tokens), dict(enumerate(tokens))
        choice.finalize()
    request.final.set()
    return request


def extras(stats: str = "summary") -> ResponseExtras:
    made = ResponseExtras(stats, one_choice_set_per_prompt=False)
    made.request_stats.append(final_stats([(2.0, 1.0, 0.5, 3), (0.5, 0.5, 0.25, 0)]))
    return made


def extended(response: Response, added: ResponseExtras) -> tuple[Response, list[str]]:
    """Return the response with the extras, and the outcomes that were reported."""
    outcomes: list[str] = []
    return asyncio.run(with_extras(response, added, outcomes.append)), outcomes


# The summaries


def em_inf_summary(stats: str, one_choice_set_per_prompt: bool, *requests: RequestStats) -> list[dict[str, Any]]:
    made = ResponseExtras(stats, one_choice_set_per_prompt)
    made.request_stats.extend(requests)
    return asyncio.run(made.em_inf_summary())


def test_each_prompt_adds_its_choices() -> None:
    one, two = [(1.0, 0.5, 0.0, 1)], [(1.0, 0.5, 0.0, 2)]
    choices = em_inf_summary("summary", True, final_stats(one, two), final_stats([*one, *two], []))
    assert [(choice["index"], choice["tokens"], choice["steps"]) for choice in choices] == [
        (0, 1, 1),
        (1, 1, 2),
        (2, 2, 3),
        (3, 0, 0),
    ]


def test_turns_of_one_choice_share_a_summary() -> None:
    turns = final_stats([(1.0, 0.5, 0.0, 1)]), final_stats([(3.0, 0.5, 0.0, 2), (2.0, 0.5, 0.0, 4)])
    choices = em_inf_summary("tokens", False, *turns)
    assert [choice["index"] for choice in choices] == [0]
    assert choices[0]["entropy_before"] == 2.0
    assert [token["steps"] for token in choices[0]["per_token"]] == [1, 2, 4]


def test_a_summary_waits_for_late_stats_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def finalize_while_waiting(late: RequestStats) -> list[dict[str, Any]]:
        made = ResponseExtras("summary", one_choice_set_per_prompt=False)
        made.request_stats.append(late)
        waiting = asyncio.create_task(made.em_inf_summary())
        await asyncio.sleep(0)
        assert not waiting.done()
        late.choices[0].tokens, late.choices[0].by_position = 1, {0: (1.0, 0.5, 0.0, 7)}
        late.choices[0].finalize()
        late.final.set()
        return await waiting

    assert asyncio.run(finalize_while_waiting(RequestStats(0, "em_inf", 1)))[0]["steps"] == 7
    monkeypatch.setattr(collector, "RESPONSE_TIMEOUT_S", 0.01)
    never = RequestStats(1, "em_inf", 1)
    never.choices[0].tokens = 3
    (choice,) = em_inf_summary("tokens", False, never)
    assert (choice["tokens"], choice["missing"], choice["per_token"]) == (3, 3, [None] * 3)


# Objects


@pytest.mark.parametrize(("stats", "summary"), [("summary", SUMMARY), ("tokens", SUMMARY | {"per_token": PER_TOKEN})])
def test_an_object_gets_the_summary_beside_its_usage(stats: str, summary: dict[str, Any]) -> None:
    response, outcomes = extended(JSONResponse(BODY), extras(stats))
    assert json.loads(bytes(response.body)) == {**BODY, "em_inf": [summary]}
    assert bytes(response.body).startswith(JSONResponse(BODY).body[:-1])
    assert response.headers.getlist("content-length") == [str(len(response.body))]
    assert response.headers["content-type"] == "application/json"
    assert outcomes == ["completed"]


def test_white_space_after_an_object_is_accepted() -> None:
    response, _ = extended(Response(json.dumps(BODY, indent=1) + "\n\n", media_type="application/json"), extras())
    assert json.loads(bytes(response.body)) == {**BODY, "em_inf": [SUMMARY]}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_lacks_becomes_null(number: float) -> None:
    made = ResponseExtras("tokens", one_choice_set_per_prompt=False)
    made.request_stats.append(final_stats([(number, 1.0, number, 0)]))
    response, _ = extended(JSONResponse({"id": "x"}), made)
    assert b"NaN" not in response.body and b"Infinity" not in response.body
    assert json.loads(bytes(response.body))["em_inf"][0]["per_token"] == [
        {"before": None, "after": 1.0, "varentropy": None, "steps": 0}
    ]


@pytest.mark.parametrize(
    ("status", "outcome"), [(400, "rejected"), (404, "rejected"), (500, "failed"), (503, "failed")]
)
def test_an_error_keeps_every_byte(status: int, outcome: str) -> None:
    error = {"error": {"message": "no", "code": status}}
    response, outcomes = extended(JSONResponse(error, status_code=status), extras())
    assert response.body == JSONResponse(error).body
    assert response.headers["content-length"] == str(len(response.body))
    assert outcomes == [outcome]


def test_an_object_without_extras_keeps_every_byte() -> None:
    response, outcomes = extended(JSONResponse(BODY), extras("none"))
    assert response.body == JSONResponse(BODY).body
    assert outcomes == ["completed"]


# Streams


def event(**fields: Any) -> str:
    header = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 17, "model": "demo"}
    return f"data: {json.dumps(header | fields, separators=(',', ':'))}\n\n"  # as vLLM writes it


FIRST = event(choices=[{"index": 0, "delta": {"content": "data: [DONE]"}}], system_fingerprint="f")
USAGE = event(choices=[], usage={"completion_tokens": 2})
CONTINUOUS = event(choices=[{"index": 0, "delta": {"content": '"choices":[]'}}], usage={"completion_tokens": 1})
KEEP_ALIVE = ": ping\n\n"
ERROR = 'data: {"error": {"message": "the engine is dead", "code": 500}}\n\n'
DONE = "data: [DONE]\n\n"


async def deliver(response: Response, got: list[str], spec_version: str = "2.3", gone_after: int | None = None) -> None:
    """Call the response as uvicorn would; the client disconnects after `gone_after` events."""
    left = asyncio.Event()

    async def receive() -> Message:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body" and message.get("body"):
            got.append(bytes(message["body"]).decode())
        if gone_after is not None and len(got) >= gone_after:
            left.set()
            if spec_version == "2.4":
                raise OSError
            await asyncio.sleep(0.01)

    scope = {"type": "http", "asgi": {"spec_version": spec_version}}
    with contextlib.suppress(ClientDisconnect):
        await response(scope, receive, send)


def streamed(events: list[str], added: ResponseExtras) -> tuple[list[str], list[str]]:
    """Return the events that the client gets, and the outcomes that were reported."""
    outcomes: list[str] = []
    got: list[str] = []

    async def generate() -> AsyncIterator[str]:
        for one in events:
            yield one

    async def main() -> None:
        response = await with_extras(StreamingResponse(generate()), added, outcomes.append)
        assert outcomes == []  # reported at the stream's end
        await deliver(response, got)

    asyncio.run(main())
    return got, outcomes


def test_a_stream_keeps_its_status_headers_and_background_task() -> None:
    async def main() -> None:
        headers = {"x-request-id": "7", "content-type": "text/event-stream; charset=utf-8"}
        background = BackgroundTask(print)
        stream = StreamingResponse(iter([DONE]), status_code=203, headers=headers, background=background)
        response = await with_extras(stream, extras(), [].append)
        assert (response.status_code, response.raw_headers) == (203, stream.raw_headers)
        assert dict(response.headers) == headers
        assert response.background is background

    asyncio.run(main())


@pytest.mark.parametrize("events", [[FIRST], [FIRST, CONTINUOUS], [FIRST, KEEP_ALIVE], [KEEP_ALIVE, FIRST, KEEP_ALIVE]])
def test_a_stream_gets_a_chunk_before_its_end(events: list[str]) -> None:
    got, outcomes = streamed([*events, DONE], extras())
    assert got[:-2] == events
    assert got[-1] == DONE
    assert got[-2].startswith("data: {") and got[-2].endswith("}\n\n") and got[-2].count("\n") == 2
    assert json.loads(got[-2].removeprefix("data: ")) == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 17,
        "model": "demo",
        "choices": [],
        "em_inf": [SUMMARY],
    }
    assert outcomes == ["completed"]


def test_the_usage_chunk_has_our_fields_and_stays_the_last() -> None:
    """Clients that keep the usage of the last chunk would lose it if another chunk followed."""
    got, outcomes = streamed([FIRST, CONTINUOUS, USAGE, KEEP_ALIVE, DONE], extras())
    assert [got[0], got[1], *got[3:]] == [FIRST, CONTINUOUS, KEEP_ALIVE, DONE]
    usage_chunk = json.loads(USAGE.removeprefix("data: "))
    assert json.loads(got[2].removeprefix("data: ")) == usage_chunk | {"em_inf": [SUMMARY]}
    assert outcomes == ["completed"]


def progress_chunk(continuous_usage: bool) -> dict[str, Any]:
    run: Any = SimpleNamespace(
        chunk_header=lambda: {"id": "1"},
        summary=lambda: {"n": 2},
        usage=lambda usage: usage | {"total_tokens": 9},
    )
    made = ResponseExtras("none", False, run, continuous_usage)
    return dict(json.loads(made.progress(run).removeprefix("data: ")))


def test_a_strategys_progress_has_the_usage_so_far_if_every_chunk_has_one() -> None:
    chunk = {"id": "1", "choices": [], "strategy": {"n": 2}}
    assert progress_chunk(continuous_usage=False) == chunk
    assert progress_chunk(continuous_usage=True) == chunk | {"usage": {"total_tokens": 9}}


def test_a_stream_without_a_chunk_is_not_broken() -> None:
    """There is no chunk to copy the id from, so ours has none."""
    got, outcomes = streamed([KEEP_ALIVE, DONE], extras())
    assert (got[0], got[-1], outcomes) == (KEEP_ALIVE, DONE, ["completed"])
    assert json.loads(got[1].removeprefix("data: ")) == {"choices": [], "em_inf": [SUMMARY]}


def test_a_stream_is_passed_on_event_by_event() -> None:
    """No event waits for the one after it."""
    outcomes: list[str] = []
    made: list[str] = []

    async def generate() -> AsyncIterator[str]:
        for one in (FIRST, USAGE, DONE):
            made.append(one)
            yield one

    async def main() -> None:
        response = await with_extras(StreamingResponse(generate()), extras(), outcomes.append)
        assert isinstance(response, StreamingResponse)
        seen = [(str(one), len(made)) async for one in response.body_iterator]
        assert [number for _, number in seen] == [1, 2, 3]
        assert seen[0] == (FIRST, 1)

    asyncio.run(main())


@pytest.mark.parametrize("stats", ["none", "summary"])
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        ({"message": "no", "code": 400}, "rejected"),
        ({"message": "no", "code": 499}, "rejected"),
        ({"message": "no", "code": 500}, "failed"),
        ({"message": "no", "code": "odd"}, "failed"),
        ({"message": "no"}, "failed"),
        ("no", "failed"),
    ],
)
def test_an_error_in_a_stream_counts_by_its_code(error: Any, outcome: str, stats: str) -> None:
    events = [FIRST, f"data: {json.dumps({'error': error})}\n\n", DONE]
    assert streamed(events, extras(stats)) == (events, [outcome])


def test_nan_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.response.summarize", lambda *_: {"entropy_before": math.nan})
    with pytest.raises(ValueError, match="not JSON compliant"):
        extended(JSONResponse(BODY), extras())


def test_a_stream_with_an_error_gets_no_chunk() -> None:
    got, outcomes = streamed([FIRST, ERROR, DONE], extras())
    assert got == [FIRST, ERROR, DONE]
    assert outcomes == ["failed"]


@pytest.mark.parametrize(("events", "outcome"), [([FIRST, DONE], "completed"), ([FIRST, ERROR, DONE], "failed")])
def test_a_stream_without_extras_only_reports_its_outcome(events: list[str], outcome: str) -> None:
    assert streamed(events, extras("none")) == (events, [outcome])


def response_event(name: str, **response: Any) -> str:
    content = {
        "type": name,
        "sequence_number": 9,
        "response": {"id": "resp_1", "usage": {"output_tokens": 2}} | response,
    }
    return f"event: {name}\ndata: {json.dumps(content)}\n\n"


@pytest.mark.parametrize("end", ["response.completed", "response.incomplete", "response.failed"])
def test_the_responses_api_has_the_summary_in_its_last_event(end: str) -> None:
    created = response_event("response.created", usage=None)
    delta = 'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"\\ndata: 4"}\n\n'
    text = "Größe\ndata: {}"
    got, outcomes = streamed([created, delta, response_event(end, output=[text])], extras())
    assert got[:2] == [created, delta]
    name, data, *rest = got[2].split("\n")
    assert name == f"event: {end}"
    assert rest == ["", ""]
    assert json.loads(data.removeprefix("data: ")) == {
        "type": end,
        "sequence_number": 9,
        "response": {"id": "resp_1", "usage": {"output_tokens": 2}, "output": [text], "em_inf": [SUMMARY]},
    }
    assert len(outcomes) == 1


@pytest.mark.parametrize("stats", ["none", "summary"])
def test_the_outcome_of_a_responses_api_stream_is_reported(stats: str) -> None:
    assert streamed([response_event("response.completed")], extras(stats))[1] == ["completed"]
    assert streamed([response_event("response.failed")], extras(stats))[1] == ["failed"]


@pytest.mark.parametrize("stats", ["none", "summary"])
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("gone_after", [0, 1])
def test_a_client_that_disconnects_is_reported_once(gone_after: int, spec_version: str, stats: str) -> None:
    """Also before the first event, when the generator never runs."""
    outcomes: list[str] = []

    async def generate() -> AsyncIterator[str]:
        yield FIRST
        await asyncio.Event().wait()  # the next token never comes
        yield DONE

    async def main() -> None:
        response = await with_extras(StreamingResponse(generate()), extras(stats), outcomes.append)
        await deliver(response, [], spec_version, gone_after)

    asyncio.run(main())
    assert outcomes == ["aborted"]


def test_a_stream_that_raises_has_failed() -> None:
    outcomes: list[str] = []

    async def generate() -> AsyncIterator[str]:
        yield FIRST
        raise RuntimeError("the engine is dead")

    async def main() -> None:
        response = await with_extras(StreamingResponse(generate()), extras(), outcomes.append)
        await deliver(response, [], "2.4")

    with pytest.raises(RuntimeError, match="the engine is dead"):
        asyncio.run(main())
    assert outcomes == ["failed"]
