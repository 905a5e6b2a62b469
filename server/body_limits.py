"""Bounds on a request's body: its size, and what is parsed and validated on the event loop.

The size is bounded for every route, and so is what JSON is made of. The number of items is bounded in `messages` and
`input` alone: of all other fields pydantic needs little time, with server/fail_fast.py.
"""

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from em_sampler.validation import ParamsError
from server.errors import too_large, too_large_message

CONVERSATION_FIELDS = ("messages", "input")
# A request of 1,000 wrong parts of a message in `input` takes pydantic half a second, one of 10,000 five seconds and
# 300 MB of error text; of 20,000 correct messages the chat's takes it 0.2 s.
MAX_PARTS = 1_000
MAX_ITEMS = 20_000
# Beside a body of a million token ids the slowest `/health/live` took 0.16 s, of 200,000 names 0.40 s, and of 900,000
# names, before there was a limit, 2.1 s.
MAX_VALUES = 1_000_000
MAX_NAMES = 200_000  # arrays and objects count as names do


class BodySizeLimit:
    """ASGI middleware: 413 for a body above the operator's `--max-request-bytes`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it by its Content-Length; without one, end it where it passes the limit."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit: int = scope["app"].state.em_inf.max_request_bytes
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if int(declared) > limit:  # uvicorn has checked that it is a number
            await _discard(scope, receive, limit)
            await too_large(limit)(scope, receive, send)
        else:
            await self.app(scope, _bounded(receive, limit), send)


def check_json(body: bytes) -> None:
    """Check that JSON is not made of so many values that parsing them would hold up other requests.

    Raises:
        ParamsError: if it has more than MAX_VALUES values, or more than MAX_NAMES names, arrays and objects.
    """
    if _within_limits(body):  # counts what is inside strings too: enough for nearly all bodies
        return
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # every quote that is left begins or ends a string
    too_many_strings = bare.count(b'"') > 2 * (MAX_VALUES + MAX_NAMES)
    is_utf8 = b"\0" not in body
    if too_many_strings or not is_utf8 or not _within_limits(b"".join(bare.split(b'"')[::2])):
        limits = f"at most {MAX_VALUES} values, and {MAX_NAMES} names, arrays and objects"
        raise ParamsError("body", f"is made of too many values; may have {limits}")


def _within_limits(text: bytes) -> bool:
    return text.count(b",") < MAX_VALUES and sum(map(text.count, (b":", b"[", b"{"))) <= MAX_NAMES


def check_items(body: Any) -> None:
    """Check that a conversation is not so large that its validation would hold up other requests.

    Raises:
        ParamsError: if `messages` or `input` has more than MAX_ITEMS items in all, or an array of more than MAX_PARTS
            inside. An item is an element of an array or a field of an object. Token ids do not count.
    """
    for field in CONVERSATION_FIELDS:
        conversation = body.get(field) if isinstance(body, dict) else None
        if not isinstance(conversation, list):
            continue
        items = 0
        for depth, container in _containers(conversation):
            if depth and isinstance(container, list) and len(container) > MAX_PARTS:
                raise ParamsError(f"body.{field}", f"has an array of {len(container)} parts; at most {MAX_PARTS}")
            items += len(container)
            if items > MAX_ITEMS:
                raise ParamsError(f"body.{field}", f"has more than {MAX_ITEMS} items in its messages and parts")


def _containers(conversation: list[Any]) -> Iterator[tuple[int, list[Any] | dict[str, Any]]]:
    """Yield (depth, container) of all lists and objects but lists of token ids in the first two levels."""
    left: list[tuple[int, Any]] = [(0, conversation)]
    while left:
        depth, container = left.pop()
        if depth < 2 and isinstance(container, list) and {type(item) for item in container} == {int}:
            continue
        yield depth, container
        children = container.values() if isinstance(container, dict) else container
        left += [(depth + 1, child) for child in children if isinstance(child, dict | list)]


async def _discard(scope: Scope, receive: Receive, limit: int) -> None:
    """Read some of a body that is too large: a client that is still sending would not see the answer.

    A client that waits for `100 Continue` has not begun to send.
    """
    if any(name == b"expect" for name, _ in scope["headers"]):
        return
    discarded, more = 0, True
    while more and discarded <= limit:
        message = await receive()
        discarded += len(message.get("body", b""))
        more = message.get("more_body", False)


def _bounded(receive: Receive, limit: int) -> Receive:
    received = 0

    async def receive_within_limit() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:  # FastAPI and vLLM pass this on and answer it in OpenAI's shape
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, too_large_message(limit))
        return message

    return receive_within_limit
