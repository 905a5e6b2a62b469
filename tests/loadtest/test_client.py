"""Requests to the mock server over real HTTP: times, counts, and errors of replies that break off."""

import asyncio
import gzip
from typing import Any

import pytest

from loadtest import client
from loadtest.client import Client
from loadtest.measurements import MeasuredRequest
from loadtest.scenario import Limits
from tests.loadtest.mock_server import Served, serve

BODY = {"model": "mock", "messages": [{"role": "user", "content": "1+2"}], "seed": 5}
STREAM = BODY | {"stream": True, "stream_options": {"include_usage": True}}


def send(served: Served, *bodies: dict[str, Any], **limits: float) -> list[MeasuredRequest]:
    async def run() -> list[MeasuredRequest]:
        async with Client(served.url, None, Limits(**limits)) as client:
            began = asyncio.get_running_loop().time()
            return [await client.send(body, began) for body in bodies]

    return asyncio.run(run())


def test_a_stream_is_timed_from_its_first_content_to_its_end() -> None:
    with serve(tokens=5, first_token=0.2, per_token=0.05) as served:
        (measured,) = send(served, STREAM)
    assert (measured.status, measured.error, measured.finish_reason) == ("ok", None, "stop")
    assert measured.text == "\\boxed{3}...."
    assert (measured.chunks, measured.output_tokens, measured.delivered_tokens, measured.prompt_tokens) == (5, 5, 5, 3)
    assert measured.first is not None
    # The mock's own delays are lower bounds of the measured times.
    assert measured.first - measured.sent >= 0.2
    assert len(measured.gaps) == 4
    rounding = 4 * 1e-5
    assert (
        0.2 + 4 * 0.05 - rounding
        <= measured.first + sum(measured.gaps) - measured.sent
        <= measured.last - measured.sent + rounding
    )


def test_a_reply_that_is_not_streamed_has_no_first_token() -> None:
    with serve(tokens=3) as served:
        (measured,) = send(served, BODY)
    assert (measured.status, measured.text, measured.first, measured.gaps) == ("ok", "\\boxed{3}..", None, [])
    assert (measured.output_tokens, measured.delivered_tokens) == (3, 3)


def test_a_refusal_has_the_servers_message_and_the_next_request_works() -> None:
    with serve(refused=1.0, status=503) as served:
        measured = send(served, STREAM, BODY)
    assert [(one.status, one.error) for one in measured] == [("failed", "HTTP 503: scripted")] * 2


def test_a_stream_that_breaks_off_is_incomplete_and_keeps_what_arrived() -> None:
    with serve(reset=1.0, tokens=10) as served:
        streamed, unstreamed = send(served, STREAM, BODY)
    assert streamed.status == "incomplete"
    assert streamed.error is not None and streamed.error.startswith("connection: RemoteProtocolError")
    assert (streamed.chunks, streamed.output_tokens, streamed.delivered_tokens) == (5, None, 5)
    assert unstreamed.status == "failed"


@pytest.mark.slow
def test_a_stream_that_stalls_is_given_up() -> None:
    with serve(stalled=1.0, tokens=10) as served:
        (measured,) = send(served, STREAM, stall_s=3)  # enough for the first byte on a slow machine
    assert (measured.status, measured.error) == ("incomplete", "stalled: no byte for 3 s")
    with serve(per_token=0.05, tokens=1000) as served:
        (measured,) = send(served, STREAM, request_s=3)
    assert (measured.status, measured.error) == ("incomplete", "timeout: no end after 3 s")


def test_no_server_at_the_address() -> None:
    (measured,) = send(Served(None, "http://127.0.0.1:9"), STREAM)  # type: ignore[arg-type]
    assert measured.status == "failed"
    assert measured.error is not None and measured.error.startswith("connection: ConnectError")


def test_without_usage_chunks_are_counted() -> None:
    with serve(no_usage=True, tokens=7) as served:
        (measured,) = send(served, STREAM)
    assert (measured.status, measured.output_tokens, measured.delivered_tokens) == ("ok", None, 7)


def answered(reply: bytes, headers: bytes = b"") -> MeasuredRequest:
    """Send a request to a server that answers with these bytes and then closes the connection."""

    async def run() -> MeasuredRequest:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n" % (len(reply), headers) + reply)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server, Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None, Limits()) as client:
            return await client.send(STREAM, 0.0)

    return asyncio.run(run())


@pytest.mark.parametrize("reply", [b"data: {\n\n", b"data: []\n\n", b'data: {"x": 1}\n\n', b"data: 7\n\n", b"\xff\xfe"])
def test_a_reply_that_is_no_completion_is_an_error_of_the_request(reply: bytes) -> None:
    measured = answered(reply)
    assert measured.status == "failed"
    assert measured.error is not None and measured.error.split(":")[0] in ("unreadable", "broke off")


COMPLETE = b'data: {"choices": [{"delta": {"content": "4"}, "finish_reason": "stop"}]}\n\ndata: [DONE]'


def test_a_stream_may_end_without_an_empty_line_and_be_compressed() -> None:
    for measured in (answered(COMPLETE), answered(gzip.compress(COMPLETE), b"Content-Encoding: gzip\r\n")):
        assert (measured.status, measured.error, measured.text) == ("ok", None, "4")
        assert not measured.without_done


def test_a_broken_encoding_and_a_reply_without_bounds_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = answered(COMPLETE, b"Content-Encoding: gzip\r\n")
    assert measured.status == "failed"
    assert measured.error is not None and measured.error.startswith("connection: DecodingError")
    monkeypatch.setattr(client, "MAX_REPLY_BYTES", 2048)
    measured = answered(b": ping\n\n" * 1000 + COMPLETE)
    assert (measured.status, measured.error) == ("failed", "unreadable: the response is larger than 2 KiB")


@pytest.mark.slow
def test_a_connection_that_stays_open_after_the_end_is_not_waited_for() -> None:
    async def run() -> MeasuredRequest:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + COMPLETE + b"\n\n")
            await reader.read()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        limits = Limits(stall_s=300)  # a hang would be seen by the test's own timeout
        async with server, Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None, limits) as opened:
            return await opened.send(STREAM, 0.0)

    measured = asyncio.run(asyncio.wait_for(run(), 120))
    assert (measured.status, measured.error, measured.text) == ("ok", None, "4")


def test_connections_are_reused() -> None:
    async def run(served: Served) -> int:
        async with Client(served.url, None, Limits()) as client:
            for _ in range(3):
                await asyncio.gather(*(client.send(STREAM, 0.0) for _ in range(5)))
            return len(client._all)

    with serve() as served:
        assert asyncio.run(run(served)) == 5
        assert served.mock.requests == 15
