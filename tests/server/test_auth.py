"""Keys: what is open without one, how a key is spelled, and a file of keys that changes while the server runs."""

import asyncio
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from server.auth import OPEN_ROUTES, KeyGuard, Keys, read_keys

KEY = {"Authorization": "Bearer sekret"}


async def work(request: Request) -> PlainTextResponse:
    return PlainTextResponse("worked")


async def talk(socket: WebSocket) -> None:
    await socket.accept()
    await socket.close()


def app(root_path: str = "", **args: Any) -> Any:
    methods = ["GET", "POST", "OPTIONS"]
    routes = [Route(path, work, methods=methods) for path in ("/v1/chat/completions", "/invocations", *OPEN_ROUTES)]
    mounted = Starlette(routes=[Route("/health", work, methods=methods)])
    starlette = Starlette(
        routes=[*routes, Mount("/mounted", mounted), WebSocketRoute("/v1/realtime", talk)],
        middleware=[Middleware(KeyGuard)],
    )
    starlette.state.args = Namespace(**args)

    async def with_root_path(scope: Any, receive: Any, send: Any) -> None:
        await starlette(scope | {"root_path": root_path}, receive, send)

    return with_root_path


def ask(app: Any, method: str, path: str, headers: Any = None) -> int:
    async def send() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return (await client.request(method, path, headers=headers)).status_code

    return asyncio.run(send())


@pytest.mark.parametrize("root_path", ["", "/", "/llm", "/llm/", "/v", "/health", "/invocations"])
@pytest.mark.parametrize(
    "path",
    [
        *("/v1/chat/completions", "/invocations", "//v1/chat/completions", "/%76%31/chat/completions", "/nowhere", "/"),
        *(
            "/v1/chat/completions/",
            "/mounted/health",
            "/metrics/",
            "/health/../invocations",
            "/health%2f..%2finvocations",
        ),
        *("/healthy", "/metrics/v1", "/llm/invocations", "/health;/invocations", "/v1/health"),
    ],
)
def test_everything_but_the_open_routes_needs_the_key(path: str, root_path: str) -> None:
    guarded = app(root_path, api_key=["sekret"])
    for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT"):
        assert ask(guarded, method, path) == 401
        assert ask(guarded, method, path, {"Authorization": "Bearer wrong"}) == 401
        assert ask(guarded, method, path, KEY) != 401


@pytest.mark.parametrize("root_path", ["", "/llm"])
def test_open_routes_need_no_key_to_be_read(root_path: str) -> None:
    guarded = app(root_path, api_key=["sekret"])
    for path in OPEN_ROUTES:
        assert ask(guarded, "GET", root_path + path) == 200
        assert ask(guarded, "HEAD", path) == 200
        assert ask(guarded, "POST", path) == 401


def test_a_browsers_question_about_cors_passes_as_no_route_answers_it() -> None:
    guarded = app(api_key=["sekret"])
    question = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    assert ask(guarded, "OPTIONS", "/v1/chat/completions", question) != 401
    assert ask(guarded, "OPTIONS", "/v1/chat/completions", {"Origin": "http://page"}) == 401
    assert ask(guarded, "POST", "/v1/chat/completions", question) == 401


def test_websockets_need_the_key() -> None:
    client = TestClient(app(api_key=["sekret"]))
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime"):
        pass
    with client.websocket_connect("/v1/realtime", headers=KEY):
        pass


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Bearer sekret", 200),
        (b"bearer second", 200),
        ("Bearer schlüssel".encode(), 200),
        (b"Bearer", 401),
        (b"Bearer ", 401),
        (b"Bearer  sekret", 401),
        (b"Basic sekret", 401),
        (b"sekret", 401),
        (b"Bearer \xff\xfe", 401),
    ],
)
def test_a_key_is_spelled_as_in_vllm(header: bytes, status: int) -> None:
    guarded = app(api_key=["sekret", "second", "schlüssel"])
    assert ask(guarded, "GET", "/invocations", [(b"authorization", header)]) == status


def test_without_keys_everything_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert ask(app(api_key=None), "POST", "/invocations") == 200
    monkeypatch.setenv("VLLM_API_KEY", "sekret")
    assert ask(app(api_key=None), "POST", "/invocations") == 401
    assert ask(app(api_key=None), "POST", "/invocations", KEY) == 200


def test_a_file_of_keys_is_read_again_when_it_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nold\n\n")
    keys = Keys([], file)

    def accepted() -> list[str]:
        return [key for key in ("old", "new", "# ours", "") if keys.accept(f"Bearer {key}".encode())]

    assert accepted() == ["old"]
    file.write_text("old\n new \n")
    assert accepted() == ["old", "new"]
    replacement = tmp_path / "replacement"
    replacement.write_text("new\n")
    os.replace(replacement, file)
    assert accepted() == ["new"]
    file.write_text("# nothing\n")
    assert accepted() == ["new"]
    file.unlink()
    assert accepted() == ["new"]
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2  # each once, not once a request
    assert "has no key" in errors[0]
    file.write_text("old\n")
    assert accepted() == ["old"]


def test_a_file_without_keys_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_keys(tmp_path / "missing")
    (tmp_path / "empty").write_text("\n# none\n")
    with pytest.raises(ValueError, match="has no key; must have one a line"):
        read_keys(tmp_path / "empty")
    (tmp_path / "bytes").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="cannot be read"):
        read_keys(tmp_path / "bytes")
