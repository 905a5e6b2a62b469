"""A body's size, and the items of a conversation in it."""

import asyncio
import json
from argparse import Namespace
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from em_sampler.validation import ParamsError
from server.body_limits import MAX_ITEMS, MAX_NAMES, MAX_PARTS, MAX_VALUES, BodySizeLimit, check_items, check_json
from server.fail_fast import _change
from server.protocol import Settings

LIMIT = 1000


def app(read: bool = True) -> FastAPI:
    app = FastAPI()
    app.add_middleware(BodySizeLimit)
    app.state.em_inf = Settings.from_args(Namespace(max_request_bytes=LIMIT))
    app.state.parsed = 0

    @app.post("/v1/any")
    async def count(request: Request) -> int:
        app.state.parsed += 1
        return len(await request.body()) if read else 0

    return app


def post(app: FastAPI, content: Any, **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post("/v1/any", content=content, headers=headers)

    return asyncio.run(send())


async def in_pieces(size: int) -> AsyncIterator[bytes]:
    for begin in range(0, size, 100):
        yield b"x" * min(100, size - begin)


def test_a_body_at_the_limit_passes_and_a_larger_one_is_refused_unread() -> None:
    server = app()
    assert post(server, b"x" * LIMIT).json() == LIMIT
    response = post(server, b"x" * (LIMIT + 1))
    assert (response.status_code, server.state.parsed) == (413, 1)
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("body", 413)
    assert f"at most {LIMIT} bytes" in error["message"]
    assert response.headers["connection"] == "close"


def test_a_body_without_a_length_ends_where_it_passes_the_limit() -> None:
    server = app()
    assert post(server, in_pieces(LIMIT)).json() == LIMIT
    response = post(server, in_pieces(LIMIT + 1))
    assert response.status_code == 413
    assert f"at most {LIMIT} bytes" in response.text


def test_some_of_a_refused_body_is_read_so_that_the_client_sees_the_answer_but_not_all() -> None:
    async def run(expect: list[tuple[bytes, bytes]]) -> tuple[int, int]:
        pieces, sent = 0, list[Any]()

        async def receive() -> dict[str, Any]:
            nonlocal pieces
            pieces += 1
            return {"type": "http.request", "body": b"x" * 100, "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        state = SimpleNamespace(em_inf=Settings.from_args(Namespace(max_request_bytes=LIMIT)))
        headers = [(b"content-length", b"1000000000"), *expect]
        scope: Any = {"type": "http", "app": SimpleNamespace(state=state), "headers": headers}
        await BodySizeLimit(app())(scope, receive, send)
        return pieces, sent[0]["status"]

    assert asyncio.run(run([])) == (LIMIT // 100 + 1, 413)
    assert asyncio.run(run([(b"expect", b"100-continue")])) == (0, 413)


def turn(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "a" * 10**6}] * 6_000},
        {"messages": [turn(*[{"type": "text", "text": "a"}] * MAX_PARTS)]},
        {"input": [1] * 10**6},
        {"input": [[1] * 10**6, [2] * 10**6]},
        {"prompt": [[1] * 10**6]},
        {"input": "a" * 10**6},
        {"logit_bias": {str(token): 1 for token in range(150_000)}},
        [1] * 10**6,
        "text",
    ],
    ids=range(9),
)
def test_ordinary_bodies_pass(body: Any) -> None:
    check_items(body)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": [turn(*[1] * (MAX_PARTS + 1))]}, f"array of {MAX_PARTS + 1} parts; at most {MAX_PARTS}"),
        ({"input": [{"a": {"b": [{}] * (MAX_PARTS + 1)}}]}, f"array of {MAX_PARTS + 1} parts; at most {MAX_PARTS}"),
        ({"messages": [{}] * (MAX_ITEMS + 1)}, f"more than {MAX_ITEMS} items"),
        ({"messages": [turn(*[1] * MAX_PARTS)] * 20}, f"more than {MAX_ITEMS} items"),
        ({"messages": [{str(key): 1 for key in range(MAX_ITEMS)}]}, f"more than {MAX_ITEMS} items"),
    ],
    ids=range(5),
)
def test_conversations_that_take_long_to_validate_are_refused(body: Any, says: str) -> None:
    with pytest.raises(ParamsError, match=says) as caught:
        check_items(body)
    assert caught.value.field in ("body.messages", "body.input")


@pytest.mark.parametrize(
    ("model", "field", "item", "most"),
    [
        (ChatCompletionRequest, "messages", {"role": "user", "content": 1}, 30),
        (ChatCompletionRequest, "tools", {}, 5),
        (ResponsesRequest, "input", {}, 300),
    ],
)
def test_validation_ends_at_a_lists_first_wrong_item(model: Any, field: str, item: Any, most: int) -> None:
    """Counted in errors: of one item there are as many as types that it may have."""
    _change(model)
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "input": "a", field: [item] * 500}
    with pytest.raises(ValueError, match=field) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= most  # type: ignore[attr-defined]  # pydantic's


def test_right_lists_are_read_as_before() -> None:
    _change(ChatCompletionRequest)
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    request = ChatCompletionRequest.model_validate(body | {"stop": ["x", "y"]})
    assert [message["content"] for message in request.messages] == ["a", "b"]
    assert request.stop == ["x", "y"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [1] * MAX_VALUES},
        {f"name {number}": 0 for number in range(MAX_NAMES - 1)},  # the object counts too
        {"prompt": [[]] * (MAX_NAMES - 3)},
        {"prompt": "1,[{:" * MAX_VALUES},
        {"prompt": '"\\,' * MAX_VALUES},
        {"prompt": ["\\", '\\"', ",:", '"'] * 1_000 + ["," * MAX_VALUES, ":" * MAX_NAMES]},
        {"prompt": "ü,\U0001f600" * MAX_VALUES},
    ],
    ids=["ids", "names", "arrays", "text", "escapes", "strings", "unicode"],
)
def test_json_of_any_text_and_as_many_values_passes(body: dict[str, Any]) -> None:
    check_json(json.dumps(body).encode())
    check_json(json.dumps(body, ensure_ascii=False).encode())


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"prompt": [1] * (MAX_VALUES + 1)}),
        json.dumps({f"name {number}": 0 for number in range(MAX_NAMES)}),
        json.dumps({"prompt": [[]] * MAX_NAMES}),
        json.dumps({"prompt": [{}] * MAX_NAMES}),
        json.dumps({"prompt": ["\\"] * (MAX_VALUES + 1)}),  # a quote after a backslash ends each
        json.dumps({"prompt": [""] * 2 * MAX_VALUES}),
        '{"prompt": [' + "[" * MAX_NAMES,
        json.dumps({"prompt": "," * MAX_VALUES}).encode("utf-16"),  # its strings cannot be told apart: JSON is UTF-8
    ],
    ids=["ids", "names", "arrays", "objects", "backslashes", "strings", "cut off", "utf-16"],
)
def test_json_of_more_values_is_refused_unparsed(body: str | bytes) -> None:
    with pytest.raises(
        ParamsError, match="body: is made of too many values; may have at most 1000000 values, and 200000"
    ):
        check_json(body.encode() if isinstance(body, str) else body)
