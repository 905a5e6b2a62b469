"""Keys: with one, every route needs it but the probes and the metrics. vLLM leaves open all that is not below /v1.

em-serve names `KeyGuard` in vLLM's --middleware: if it cannot be loaded, the server does not start.
"""

import hashlib
import logging
import os
import secrets
from argparse import Namespace
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

logger = logging.getLogger("vllm.em_inf")

MIDDLEWARE = "server.auth.KeyGuard"
# Routes that need no key, by GET and HEAD: they do no work, and say nothing of requests.
OPEN_ROUTES = frozenset({"/health", "/health/live", "/health/ready", "/ping", "/metrics"})
POLICY_VIOLATION = 1008  # the code that a refused websocket is closed with: RFC 6455, 7.4.1


class Keys:
    """The keys of one API server: those of the flags, or those of a file, which is read again whenever it changed."""

    def __init__(self, keys: list[str], file: Path | None = None) -> None:
        self.file = file
        self.version = _version(file)
        self.digests = [_digest(key.encode()) for key in (read_keys(file) if file else keys)]

    @classmethod
    def from_args(cls, args: Namespace) -> "Keys":
        """Make the keys of em-serve's arguments; as in vLLM, VLLM_API_KEY counts if there is no --api-key."""
        keys = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
        file = getattr(args, "api_key_file", None)
        return cls([key for key in keys if key], Path(file) if file else None)

    @property
    def required(self) -> bool:
        """Return whether requests need a key at all."""
        return self.file is not None or bool(self.digests)

    def accept(self, authorization: bytes) -> bool:
        """Return whether a header is `Bearer KEY` with one of the keys; the time does not depend on which."""
        self._read_again()
        scheme, _, key = authorization.partition(b" ")
        digest = _digest(key)
        matches = [secrets.compare_digest(digest, known) for known in self.digests]
        return any(matches) and scheme.lower() == b"bearer"

    def _read_again(self) -> None:
        """Read the file if it changed. A file without keys changes nothing: one bad write must not lock all out."""
        version = _version(self.file)
        if self.file is None or version == self.version:
            return
        self.version = version
        try:
            self.digests = [_digest(key.encode()) for key in read_keys(self.file)]
        except ValueError as error:
            logger.error("The API keys stay as they were: %s", error)
        else:
            logger.info("Read %d API keys from %s", len(self.digests), self.file)


class KeyGuard:
    """ASGI middleware: 401 for whatever is not in OPEN_ROUTES and has no key, for paths without a route too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.keys: Keys | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan" or self._allows(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose(POLICY_VIOLATION)(scope, receive, send)
        else:  # the body of vLLM's own 401
            await JSONResponse({"error": "Unauthorized"}, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        if self.keys is None:
            self.keys = Keys.from_args(scope["app"].state.args)
        if not self.keys.required or _is_preflight(scope) or _is_open(scope):
            return True
        return self.keys.accept(_header(scope, b"authorization") or b"")


def read_keys(file: Path) -> list[str]:
    """Return the keys in `file`: one a line, without empty lines and lines that begin with #.

    Raises:
        ValueError: if it cannot be read or has no key.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{file} has no key; must have one a line")
    return keys


def _is_open(scope: Scope) -> bool:
    """Return whether the request is for a probe or the metrics, with or without the root path, spelled exactly."""
    open_paths = OPEN_ROUTES | {scope.get("root_path", "").rstrip("/") + route for route in OPEN_ROUTES}
    return scope.get("method") in ("GET", "HEAD") and scope["path"] in open_paths


def _is_preflight(scope: Scope) -> bool:
    """Return whether this is a browser's question about CORS: vLLM's CORSMiddleware answers it, no route does."""
    asks = _header(scope, b"origin") is not None and _header(scope, b"access-control-request-method") is not None
    return scope.get("method") == "OPTIONS" and asks


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def _version(file: Path | None) -> tuple[int, ...] | None:
    """Return what differs when a file was written or replaced; None if it cannot be looked at."""
    try:
        status = file.stat() if file else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size) if status else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
