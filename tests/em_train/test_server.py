"""Outputs from servers that are not em-serve, answer nonsense or cannot be reached: a row, or one clear error."""

import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from em_train.cli import main
from em_train.prompts import InputError
from em_train.server import api_root, read_output

REPLY = {"choices": [{"message": {"content": "7"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}


class Fake(HTTPServer):
    """A server whose every completion is `reply`, text or JSON; it remembers the requests' paths and bodies."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply: Any = REPLY
        self.seen: list[tuple[str, Any]] = []

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        self.server.seen.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        reply = self.server.reply
        body = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "3+4"}\n')
    return path


def sample(base_url: str, prompts: Path, *flags: str) -> int:
    out = str(prompts.with_name("o.jsonl"))
    return main(["sample", "--model", "m", "--base-url", base_url, "--prompts", str(prompts), "--out", out, *flags])


def written(prompts: Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(prompts.with_name("o.jsonl").read_text())
    return row


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        ("http://h/v1", "http://h/v1"),
        ("http://h/v1/", "http://h/v1"),
        ("https://h/api/paas/v4", "https://h/api/paas/v4"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        ("http://h/v1/chat/completions", "http://h/v1"),
        ("http://h/v1/completions/", "http://h/v1"),
        ("http://h/chat/completions", "http://h/v1"),
        (" http://h/v1 ", "http://h/v1"),
    ],
)
def test_an_address_with_a_path_is_used_as_it_is(given: str, root: str):
    assert str(api_root(given)) == root


@pytest.mark.parametrize(
    "given", ["", "h:8000", "127.0.0.1:8000/v1", "ftp://h", "http://", "http://[::1", "http://h:x"]
)
def test_an_address_that_is_none_is_named(given: str):
    with pytest.raises(InputError, match=r"--base-url: got .*; must be an address such as http://127\.0\.0\.1:8000/v1"):
        api_root(given)


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTP_PROXY", "http_proxy", "all_proxy"])
@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://127.0.0.1:9"])
def test_proxies_of_the_environment_are_not_used(
    name: str, proxy: str, fake: Fake, prompts: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(name, proxy)
    assert sample(fake.origin, prompts) == 0
    assert [path for path, _ in fake.seen] == ["/v1/chat/completions"]


@pytest.mark.parametrize("usage", [{}, {"usage": None}, {"usage": {}}])
def test_a_server_without_usage_gives_rows_without_a_count(usage: dict[str, Any], fake: Fake, prompts: Path):
    fake.reply = {"choices": REPLY["choices"]} | usage
    assert sample(fake.origin, prompts) == 0
    row = written(prompts)
    assert row["output"] == "7" and row["finish_reason"] == "stop" and "tokens" not in row


def test_chat_turns_go_to_the_chat_route_though_text_is_plain(fake: Fake, prompts: Path):
    prompts.write_text('{"prompt": [{"role": "user", "content": "3+4"}]}\n')
    assert sample(fake.origin, prompts, "--plain") == 0
    [(path, body)] = fake.seen
    assert path == "/v1/chat/completions" and body["messages"] == [{"role": "user", "content": "3+4"}]


@pytest.mark.parametrize(
    "reply",
    [
        "<html>",
        "",
        "[" * 100_000,
        [],
        {},
        {"choices": []},
        {"choices": None},
        {"choices": [{"text": "7"}]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": [7]}}]},
    ],
)
def test_a_reply_that_is_none_is_one_line(reply: Any, fake: Fake, prompts: Path, capfd: pytest.CaptureFixture[str]):
    fake.reply = reply
    assert sample(fake.origin, prompts) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("em-train:")]
    assert line.startswith(f"em-train: --base-url: got {fake.origin!r}; it answered no completion: ")


def test_a_key_that_no_header_can_hold_is_named(fake: Fake, prompts: Path, capfd: pytest.CaptureFixture[str]):
    assert sample(fake.origin, prompts, "--api-key", "schlüssel") == 2
    assert "--api-key: must be printable ASCII without spaces" in capfd.readouterr().err


def test_a_certificate_of_ones_own_is_named_and_can_be_trusted(
    fake: Fake, prompts: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    make += ["-keyout", key, "-out", certificate, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(make, check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    assert sample(fake.origin.replace("http", "https"), prompts) == 2
    assert "does not speak TLS" in capfd.readouterr().err
    fake.socket = context.wrap_socket(fake.socket, server_side=True)
    assert sample(fake.origin, prompts) == 2
    assert "does not speak HTTP" in capfd.readouterr().err
    assert sample(fake.origin.replace("http", "https"), prompts) == 2
    assert "certificate is not trusted" in capfd.readouterr().err
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert sample(fake.origin.replace("http", "https"), prompts) == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
CHOICE = st.fixed_dictionaries(
    {},
    optional={
        "message": JSON | st.fixed_dictionaries({"content": JSON}),
        "text": JSON,
        "finish_reason": JSON,
        "token_ids": JSON | st.lists(st.integers()),
    },
)
REPLIES = JSON | st.fixed_dictionaries(
    {"choices": st.lists(CHOICE | JSON, max_size=2) | JSON},
    optional={"usage": JSON | st.fixed_dictionaries({"completion_tokens": JSON}), "em_inf": JSON},
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(reply=REPLIES.map(lambda reply: json.dumps(reply).encode()) | st.binary(max_size=64), as_text=st.booleans())
def test_any_reply_is_an_output_or_an_input_error(reply: bytes, as_text: bool):
    refusal = ""
    try:
        text, details = read_output(reply, as_text, "--base-url: x")
    except InputError as error:
        refusal = str(error)
    else:
        assert isinstance(text, str)
        json.dumps([text, details], ensure_ascii=False).encode()  # what the file of outputs takes
    assert not refusal or refusal.startswith("--base-url: x; it answered no completion: ")
    assert "\n" not in refusal
