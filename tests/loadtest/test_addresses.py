"""Addresses as users write them, and what is said if nothing answers there."""

import asyncio
import ssl
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest

from loadtest.addresses import api_root
from loadtest.client import Client
from loadtest.scenario import Limits, ScenarioError

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.mark.parametrize(
    ("written", "root"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        (" http://h:1/v1/ ", "http://h:1/v1"),
        ("http://h:1/v1/chat/completions", "http://h:1/v1"),
        ("http://h:1/chat/completions/", "http://h:1/v1"),
        ("https://h/api/paas/v4", "https://h/api/paas/v4"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        ("https://h/v1beta/openai/chat/completions", "https://h/v1beta/openai"),
        ("http://h/prefix/v1", "http://h/prefix/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_a_path_is_used_as_it_is_and_v1_is_the_default(written: str, root: str) -> None:
    assert api_root(written) == root


@pytest.mark.parametrize(
    "written",
    [
        *("", "h:1", "127.0.0.1:8000", "/v1", "ftp://h", "nowhere:x"),
        *("http://", "http://h:99999", "http://h:x", "http://h/\0", "http://[::1"),
        *("http://h/v1?key=1", "http://h/v1#x"),
    ],
)
def test_what_is_no_address_is_an_error(written: str) -> None:
    with pytest.raises(ScenarioError, match=r"--base-url: got .*; must "):
        api_root(written)


def test_a_key_that_no_header_can_have_is_an_error_that_does_not_show_it() -> None:
    for key in ("sk-secret\n", "sk-secret\u00e9", "sk-secret\0"):
        with pytest.raises(ScenarioError, match="--api-key: has a character") as caught:
            Client("http://h", key, Limits())
        assert "secret" not in str(caught.value)


# ---- Servers that do not answer as they should


@contextmanager
def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Serve on a free port, in a thread."""
    ready, stopped, port, loop = Event(), asyncio.Event(), [0], asyncio.new_event_loop()

    async def serve() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
        port[0] = server.sockets[0].getsockname()[1]
        ready.set()
        await stopped.wait()
        server.close()

    def run() -> None:
        loop.set_exception_handler(lambda *_: None)  # handshakes that fail are the test
        loop.run_until_complete(serve())
        loop.close()

    thread = Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield port[0]
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join()


async def not_found(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    writer.close()


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def binary(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x15\x03\x01\x00\x02\x02\x46")
    writer.close()


def reason(url: str) -> str:
    async def get() -> None:
        async with Client(url, None, Limits(stall_s=2)) as client:
            await client.get(f"{client.root}/models")

    with pytest.raises(ScenarioError) as caught:
        asyncio.run(get())
    message = str(caught.value)
    assert message.startswith(f"{url}/v1/models"), "the address that was tried"
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def self_signed(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    folder: Path = tmp_path_factory.mktemp("certificate")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"], cwd=folder, check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


def test_each_reason_is_told_as_such(self_signed: ssl.SSLContext) -> None:
    with serving(not_found, self_signed) as port:
        found = reason(f"https://127.0.0.1:{port}")
        assert "its certificate is not trusted: self-signed certificate; SSL_CERT_FILE can name" in found
        assert "no HTTP is spoken there" in (found := reason(f"http://127.0.0.1:{port}"))
        assert found.endswith("is it https://?")
    with serving(not_found) as port:
        assert "no TLS is spoken there" in (found := reason(f"https://127.0.0.1:{port}"))
        assert found.endswith("is it http://?")
        assert reason(f"http://127.0.0.1:{port}").endswith("/v1/models: HTTP 404")
    with serving(binary) as port:
        assert "no HTTP is spoken there" in reason(f"http://127.0.0.1:{port}")
    with serving(silent) as port:
        assert reason(f"http://127.0.0.1:{port}").endswith("does not answer: no reply within the time allowed")
    assert "the connection is refused" in reason(f"http://127.0.0.1:{port}")
    assert "its host is not known" in reason("http://no-such-host.invalid")
