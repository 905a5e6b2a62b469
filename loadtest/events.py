"""Decodes server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) from pieces of a stream.

No input or output. The package httpx-sse splits lines at U+2028 too, which JSON may contain.
"""

from collections.abc import Iterator
from dataclasses import dataclass

MAX_EVENT_BYTES = 16 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Event:
    """An event: its data, several lines joined, and the name of its type if it has one."""

    data: bytes
    type: bytes = b""


class EventDecoder:
    """Decodes one stream. Feed it all pieces, then call `end`: servers leave out the last empty line."""

    def __init__(self) -> None:
        self._rest = b""  # of a line that is not complete
        self._at_start = True
        self._data: list[bytes] = []
        self._type = b""
        self._bytes = 0  # of the event so far

    def feed(self, piece: bytes) -> Iterator[Event]:
        """Yield the events that are complete with this piece.

        Raises:
            ValueError: if an event is larger than `MAX_EVENT_BYTES`.
        """
        text = self._rest + piece
        if self._at_start:
            if len(text) < len(BYTE_ORDER_MARK) and BYTE_ORDER_MARK.startswith(text):
                self._rest = text
                return
            text, self._at_start = text.removeprefix(BYTE_ORDER_MARK), False
        lines = text.splitlines(keepends=True)  # of bytes: at \n, \r\n and \r alone
        self._rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""  # \r may be half of \r\n
        for line in lines:
            yield from self._line(line.rstrip(b"\r\n"))
        if self._bytes + len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event is larger than {MAX_EVENT_BYTES >> 20} MiB")

    def end(self) -> Iterator[Event]:
        """Yield the last event, if no empty line has ended it."""
        for line in (*self._rest.splitlines(), b""):
            yield from self._line(line)

    def _line(self, line: bytes) -> Iterator[Event]:
        if not line:
            if self._data:
                yield Event(b"\n".join(self._data), self._type)
            self._data, self._type, self._bytes = [], b"", 0
            return
        field, _, value = line.partition(b":")  # a comment has an empty field
        self._bytes += len(line)
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
        elif field == b"event":
            self._type = value.removeprefix(b" ")
