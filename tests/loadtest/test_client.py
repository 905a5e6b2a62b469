"""Calls to the mock server over real HTTP: what is timed, counted, and told of a reply that breaks off."""

import asyncio
from typing import Any

import pytest

from loadtest.client import Client, api_root
from loadtest.records import Call
from loadtest.scenario import Limits
from tests.loadtest.mocked import Served, serve

BODY = {"model": "mock", "messages": [{"role": "user", "content": "1+2"}], "seed": 5}
STREAM = BODY | {"stream": True, "stream_options": {"include_usage": True}}


def ask(served: Served, *bodies: dict[str, Any], **limits: float) -> list[Call]:
    async def run() -> list[Call]:
        async with Client(served.url, None, Limits(**limits)) as client:
            began = asyncio.get_running_loop().time()
            return [await client.call(body, began) for body in bodies]

    return asyncio.run(run())


def test_the_address_may_be_written_as_people_write_it() -> None:
    for written in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert api_root(written) == "http://h:1/v1"
    assert api_root("http://h/prefix/v1") == "http://h/prefix/v1"


def test_a_stream_is_timed_from_its_first_content_to_its_end() -> None:
    with serve(tokens=5, first_token=0.2, per_token=0.05) as served:
        (call,) = ask(served, STREAM)
    assert (call.status, call.error, call.finish_reason) == ("ok", None, "stop")
    assert call.text == "\\boxed{3}...."
    assert (call.chunks, call.output_tokens, call.delivered_tokens, call.prompt_tokens) == (5, 5, 5, 3)
    assert call.first is not None
    # The mock's own times are the least there can be between what was sent and what is seen of it.
    assert call.first - call.sent >= 0.2
    assert len(call.gaps) == 4
    rounding = 4 * 1e-5
    assert 0.2 + 4 * 0.05 - rounding <= call.first + sum(call.gaps) - call.sent <= call.last - call.sent + rounding


def test_a_reply_in_one_piece_has_no_first_token() -> None:
    with serve(tokens=3) as served:
        (call,) = ask(served, BODY)
    assert (call.status, call.text, call.first, call.gaps) == ("ok", "\\boxed{3}..", None, [])
    assert (call.output_tokens, call.delivered_tokens) == (3, 3)


def test_a_refusal_has_the_servers_words_and_the_next_request_works() -> None:
    with serve(refused=1.0, status=503) as served:
        calls = ask(served, STREAM, BODY)
    assert [(call.status, call.error) for call in calls] == [("failed", "HTTP 503: scripted")] * 2


def test_a_stream_that_breaks_off_is_incomplete_with_what_had_come() -> None:
    with serve(reset=1.0, tokens=10) as served:
        streamed, whole = ask(served, STREAM, BODY)
    assert streamed.status == "incomplete"
    assert streamed.error is not None and streamed.error.startswith("connection: RemoteProtocolError")
    assert (streamed.chunks, streamed.output_tokens, streamed.delivered_tokens) == (5, None, 5)
    assert whole.status == "failed"


def test_a_stream_that_stalls_is_given_up() -> None:
    with serve(stalled=1.0, tokens=10) as served:
        (call,) = ask(served, STREAM, stall_s=0.3)
    assert (call.status, call.error) == ("incomplete", "stalled: no byte for 0.3 s")
    with serve(per_token=0.05, tokens=1000) as served:
        (call,) = ask(served, STREAM, request_s=0.5)
    assert (call.status, call.error) == ("incomplete", "timeout: no end after 0.5 s")


def test_nobody_there() -> None:
    (call,) = ask(Served(None, "http://127.0.0.1:9"), STREAM)  # type: ignore[arg-type]
    assert call.status == "failed"
    assert call.error is not None and call.error.startswith("connection: ConnectError")


def test_without_usage_the_chunks_are_what_is_known() -> None:
    with serve(no_usage=True, tokens=7) as served:
        (call,) = ask(served, STREAM)
    assert (call.status, call.output_tokens, call.delivered_tokens) == ("ok", None, 7)


@pytest.mark.parametrize("reply", [b"data: {\n\n", b"data: []\n\n", b'data: {"x": 1}\n\n', b"data: 7\n\n", b"\xff\xfe"])
def test_what_is_no_completion_is_told_not_raised(reply: bytes) -> None:
    async def run() -> Call:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(reply) + reply)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server, Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None, Limits()) as client:
            return await client.call(STREAM, 0.0)

    call = asyncio.run(run())
    assert call.status == "failed"
    assert call.error is not None and call.error.split(":")[0] in ("unreadable", "broke off")


def test_connections_are_used_again() -> None:
    async def run(served: Served) -> int:
        async with Client(served.url, None, Limits()) as client:
            for _ in range(3):
                await asyncio.gather(*(client.call(STREAM, 0.0) for _ in range(5)))
            return len(client._all)

    with serve() as served:
        assert asyncio.run(run(served)) == 5
        assert served.mock.requests == 15
