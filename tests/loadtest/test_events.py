"""Server-sent events: each way of writing them that servers use, cut into pieces anywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import events
from loadtest.events import Event, EventDecoder


def decoded(*pieces: bytes) -> list[Event]:
    decoder = EventDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)] + list(decoder.end())


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"data: a\n\ndata: b\n\n", [Event(b"a"), Event(b"b")]),
        (b"data:a\r\n\r\ndata:b\r\n\r\n", [Event(b"a"), Event(b"b")]),
        (b"data: a\r\rdata: b\r\r", [Event(b"a"), Event(b"b")]),
        (b"data: a\n\ndata: [DONE]", [Event(b"a"), Event(b"[DONE]")]),
        (b"data: a\n\ndata: [DONE]\n", [Event(b"a"), Event(b"[DONE]")]),
        (b"\xef\xbb\xbfdata: a\n\n", [Event(b"a")]),
        (b": comment\n\n:\n\ndata: a\n\n", [Event(b"a")]),
        (b"event: error\nid: 7\nretry: 10\ndata: a\n\ndata: b\n\n", [Event(b"a", b"error"), Event(b"b")]),
        (b"data: {\ndata:  1}\n\n", [Event(b"{\n 1}")]),
        (b"data\n\ndata: \n\n", [Event(b""), Event(b"")]),
        (b"nonsense\n\nevent: x\n\n", []),
        ("data: \u2028 \x85\n\n".encode(), [Event("\u2028 \x85".encode())]),
        (b"", []),
    ],
)
def test_events_are_the_same_however_the_stream_is_cut(stream: bytes, expected: list[Event]) -> None:
    assert decoded(stream) == expected
    assert decoded(*(stream[i : i + 1] for i in range(len(stream)))) == expected
    for cut in range(len(stream)):
        assert decoded(stream[:cut], stream[cut:]) == expected


@given(st.lists(st.binary(max_size=30)))
def test_any_bytes_give_the_same_events_however_they_are_cut(pieces: list[bytes]) -> None:
    assert decoded(*pieces) == decoded(b"".join(pieces))


def test_an_event_is_known_when_its_empty_line_arrives() -> None:
    decoder = EventDecoder()
    assert list(decoder.feed(b"data: a\r\n\r\n")) == [Event(b"a")]


@pytest.mark.parametrize("piece", [b"data: xxxxxxxxxx", b"data: xxxx\n", b"event: xxxxxxx\n"])
def test_an_event_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch, piece: bytes) -> None:
    monkeypatch.setattr(events, "MAX_EVENT_BYTES", 100)
    decoder = EventDecoder()
    with pytest.raises(ValueError, match="an event is larger than"):
        [list(decoder.feed(piece)) for _ in range(20)]
