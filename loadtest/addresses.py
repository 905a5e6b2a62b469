"""Finds a server's API from the address that a user gives, and says in words why nothing answers there."""

import socket
import ssl
from collections.abc import Iterator

import httpx

from loadtest.inputs import one_line, shortened
from loadtest.scenario import ScenarioError


def api_root(base_url: str) -> str:
    """Return the address to which `/chat/completions` is added.

    A path is used as it is, because APIs are at `/v1`, `/api/v4`, `/v1beta/openai` and elsewhere; without one it is
    `/v1`. A trailing slash and a trailing `/chat/completions` are dropped.

    Raises:
        ScenarioError: if it is no address of HTTP.
    """
    try:
        url = httpx.URL(base_url.strip())
        valid = url.scheme in ("http", "https") and url.host and 0 < (url.port or 80) < 1 << 16
    except (httpx.InvalidURL, ValueError):
        valid = False
    if not valid:
        raise ScenarioError(f"--base-url: got {shortened(base_url)}; must be like http://127.0.0.1:8000/v1")
    if url.query or url.fragment:
        raise ScenarioError(f"--base-url: got {shortened(base_url)}; must end before ? and #")
    path = url.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return str(url.copy_with(path=path or "/v1"))


def why(error: Exception, url: str) -> str:
    """Return the reason of a failed exchange in one line, as a user can act on it."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"its certificate is not trusted: {cause.verify_message.rstrip('.')}; "
                "SSL_CERT_FILE can name a file with the certificate to trust"
            )
        if isinstance(cause, ssl.SSLError):
            return f"no TLS is spoken there ({cause.reason or 'SSL error'}); is it http://?"
        if isinstance(cause, socket.gaierror):
            return f"its host is not known ({cause.strerror})"
        if isinstance(cause, ConnectionRefusedError):
            return "the connection is refused; does the server run, and at this port?"
    if isinstance(error, httpx.ConnectTimeout):
        return "no connection within the time allowed; is the host right?"
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return "no reply within the time allowed"
    if isinstance(error, httpx.RemoteProtocolError):
        return f"no HTTP is spoken there ({one_line(error)})" + (
            "" if url.startswith("https:") else "; is it https://?"
        )
    return one_line(f"{type(error).__name__} {error}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__
