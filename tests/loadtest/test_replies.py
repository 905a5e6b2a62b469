"""Replies of servers that other clients accept, and of servers that nobody accepts."""

import json
from typing import Any

import pytest

from loadtest.measurements import MeasuredRequest
from loadtest.replies import StreamedReply, error_message, read_reply, set_status


def chunk(content: str | None = None, finish_reason: str | None = None, **other: Any) -> bytes:
    choice = {"index": 0, "delta": {} if content is None else {"content": content}, "finish_reason": finish_reason}
    return event({"object": "chat.completion.chunk", "choices": [choice]} | other)


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def read(*pieces: bytes) -> MeasuredRequest:
    """Read a stream whose pieces arrive a second apart and that ends properly."""
    measured = MeasuredRequest(seed=0)
    reply = StreamedReply(measured)
    try:
        for second, piece in enumerate(pieces):
            reply.receive(piece, float(second))
        reply.end(float(len(pieces)))
    except ValueError as error:
        measured.error = f"unreadable: {error}"
    measured.text = "".join(reply.parts)
    set_status(measured)
    return measured


START, END, DONE = chunk("4"), chunk(finish_reason="stop"), b"data: [DONE]\n\n"
USAGE = {"usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}


@pytest.mark.parametrize(
    "stream",
    [
        [START, END, DONE.strip()],
        [START, END, event(USAGE), DONE],
        [START, END, event(USAGE | {"choices": None}), DONE],
        [event({"type": "ping"}), START, b": ping\n\n", END, DONE],
        [START, event({"object": "unknown", "x": 1}), END, DONE],
        [b"\xef\xbb\xbf" + START, b"event: message\n" + END, DONE],
        [(START + END + DONE).replace(b"\n", b"\r\n")],
        [START.replace(b', "choices"', b',\ndata: "choices"'), END, DONE],
        [chunk("4", error=None), END, DONE],
        [chunk("4", usage=None), END, DONE],
        [chunk("4", service_tier=None), END, DONE, b"data: nonsense after the end\n\n"],
        [chunk("4", em_inf=None, strategy="x", usage=7), END, DONE],
        [
            event({"choices": [{"delta": {"content": [{"type": "text", "text": "4"}]}, "finish_reason": None}]}),
            END,
            DONE,
        ],
        [event({"choices": [{"delta": None}]}), START, END, DONE],
        [START, END],
    ],
)
def test_what_other_clients_accept_is_complete(stream: list[bytes]) -> None:
    measured = read(*stream)
    assert (measured.status, measured.error, measured.text, measured.chunks) == ("ok", None, "4", 1)
    assert measured.without_done is (stream == [START, END])


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        ([START], "broke off: the stream ended without finish_reason and without [DONE]"),
        ([START, DONE], "no finish_reason: the reply has no end"),
        ([START, event({"error": {"message": "no\n memory"}}), END, DONE], "error in the stream: no memory"),
        ([START, event({"error": "none"}), END, DONE], "error in the stream: none"),
        ([START, event({"object": "error", "message": "none"}), END, DONE], "error in the stream: none"),
        ([START, b'event: error\ndata: {"message": "none"}\n\n', END, DONE], "error in the stream: none"),
        ([START, event(7)], "unreadable: an event is no JSON object: 7"),
        ([START, event({"choices": 7})], "unreadable: choices: got 7; must be a list of objects"),
        ([START, event({"choices": [{"index": 1, "delta": {}}]})], "unreadable: the server sends several replies"),
        ([START, event({"choices": [{}, {}]})], "unreadable: the server sends several replies"),
        ([START, event({"choices": [{"delta": []}]})], "unreadable: delta: got []; must be an object"),
        ([START, event({"choices": [{"delta": {"content": 7}}]})], "unreadable: content: got 7; must be text"),
        ([START, b"data: " + b"[" * 100_000 + b"\n\n"], "unreadable: nested deeper than 64"),
        ([START, b'data: {"x": ' + b"[" * 65 + b"]" * 65 + b"}\n\n"], "unreadable: nested deeper than 64"),
        ([START, b"data: " + b"9" * 5000 + b"\n\n"], "unreadable: Exceeds the limit"),
    ],
)
def test_what_is_no_reply_is_an_error_that_says_so(stream: list[bytes], error: str) -> None:
    measured = read(*stream)
    assert measured.status == "incomplete"
    assert measured.error is not None and measured.error.startswith(error)
    assert measured.text == "4", "what arrived before is kept"


@pytest.mark.parametrize("wrong", [None, "3", -1, 1.5, True, [3], 10**400, 1e300, 1e13])
def test_usage_that_is_no_count_was_not_sent(wrong: object) -> None:
    measured = read(START, END, event({"usage": {"prompt_tokens": wrong, "completion_tokens": 2}}), DONE)
    assert (measured.status, measured.prompt_tokens, measured.output_tokens) == ("ok", None, 2)


def test_stats_that_are_no_numbers_were_not_sent() -> None:
    summary = {
        "tokens": "3",
        "missing": -1,
        "entropy_before": 0.5,
        "entropy_after": 1e400,
        "method": "logits",
        "x": [1],
    }
    assert read(START, event({"em_inf": [summary]}), END, DONE).em_inf == {"entropy_before": 0.5, "method": "logits"}
    assert read(START, b'data: {"em_inf": [{"entropy_after": NaN}]}\n\n', END, DONE).em_inf == {}


def test_a_whole_reply_is_read() -> None:
    tokens = [{"top_logprobs": [{"logprob": -0.5}, {"logprob": None}, {"logprob": "x"}, 7]}, {}, 7]
    choice = {"message": {"content": "4"}, "finish_reason": "stop", "logprobs": {"content": tokens}}
    measured = MeasuredRequest(seed=0)
    read_reply(json.dumps({"choices": [choice]} | USAGE).encode(), measured)
    assert (measured.text, measured.finish_reason, measured.output_tokens) == ("4", "stop", 2)
    assert measured.top_logprobs == [[-0.5], [], []]


def test_log_probabilities_of_a_stream_are_collected_and_odd_ones_do_no_harm() -> None:
    pieces = [
        {"delta": {"content": "4"}, "logprobs": logprobs}
        for logprobs in ({"content": [{"top_logprobs": [{"logprob": -0.5}]}, {}]}, None, [], {"content": 7})
    ]
    measured = read(*(event({"choices": [piece]}) for piece in pieces), END, DONE)
    assert (measured.status, measured.text) == ("ok", "4444")
    assert measured.top_logprobs == [[-0.5], []]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"<html>", "Expecting value"),
        (b"[]", r"the reply is no JSON object: \[\]"),
        (b"{}", "the reply has no choices"),
        (b'{"choices": []}', "the reply has no choices"),
        (b'{"choices": [7]}', r"choices: got \[7\]"),
        (b'{"choices": [{"message": "4"}]}', "message: got '4'; must be an object"),
        (b"\xff", "utf-8"),
    ],
)
def test_a_whole_reply_that_is_none_is_an_error(body: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_reply(body, MeasuredRequest(seed=0))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "no such model"}}', "no such model"),
        (b'{"error": "no such model"}', "no such model"),
        (b'{"message": "no such model"}', "no such model"),
        (b'{"detail": "Not Found"}', '{"detail": "Not Found"}'),
        (b"<html>\n<b>Bad  Gateway", "<html> <b>Bad Gateway"),
        (b"\x1b[2J\xff", "\\x1b[2J\ufffd"),
        (b"[" * 5000, "[" * 300),
    ],
)
def test_an_error_is_one_line(body: bytes, message: str) -> None:
    assert error_message(body) == message
