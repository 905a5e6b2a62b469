"""Outputs from an OpenAI-compatible server. Whatever it gets wrong is an `InputError` that names its address."""

import asyncio
import os
import ssl
from types import TracebackType
from typing import Any

import httpx
from pydantic import BaseModel, Field, ValidationError

from em_train.fingerprint import PROBE, fingerprint
from em_train.prompts import InputError, Prompt
from em_train.settings import SampleSettings

MAX_ATTEMPTS = 5  # of a request, if the server is busy or restarting
FIRST_RETRY_DELAY_S = 0.5  # doubled for each further attempt
RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)
REQUEST_TIMEOUT_S = 600
EXAMPLE_ADDRESS = "http://127.0.0.1:8000/v1"
ROUTES = ("/chat/completions", "/completions")

ReadOutput = tuple[str, dict[str, Any]]  # the text, and the fields of the file's row that describe it


def api_root(base_url: str) -> httpx.URL:
    """Return the address that routes follow: without a route at the end, and with `/v1` if there is no other path.

    Raises:
        InputError: if it is no address.
    """
    problem = f"--base-url: got {base_url!r}; must be an address such as {EXAMPLE_ADDRESS}"
    try:
        url = httpx.URL(base_url.strip())
    except httpx.InvalidURL:
        raise InputError(problem) from None
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(problem)
    path = url.path.rstrip("/")
    for route in ROUTES:
        path = path.removesuffix(route)
    return url.copy_with(path=path.rstrip("/") or "/v1")


class Server:
    """A server that completes prompts; a context manager. Variables such as HTTP_PROXY are not followed."""

    def __init__(self, settings: SampleSettings) -> None:
        assert settings.base_url is not None
        self._settings = settings
        self._place = f"--base-url: got {settings.base_url!r}"  # how an error begins
        self._root = api_root(settings.base_url)
        key = settings.api_key or os.environ.get("OPENAI_API_KEY") or ""
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise InputError("--api-key: must be printable ASCII without spaces, and so must $OPENAI_API_KEY")
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=REQUEST_TIMEOUT_S,
            verify=ssl.create_default_context(),
            trust_env=False,
        )
        self._em_serve_fields: dict[str, Any] = {}  # of a request; no other server knows them
        self._tokenizer: dict[str, str] = {}  # the field of a row that says whose token ids it has

    async def __aenter__(self) -> "Server":
        try:
            await self._recognise()
        except httpx.HTTPError as error:
            await self._client.aclose()
            raise InputError(f"{self._place}; nothing answers there: {_explain(error)}") from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def complete(self, prompt: Prompt, seed: int) -> ReadOutput:
        """Return the server's output to a prompt.

        Raises:
            InputError: if the server refuses, in its own words, does not answer, or answers no completion.
        """
        settings = self._settings
        as_text = settings.plain and isinstance(prompt.content, str)
        limits = {"model": settings.model, "max_tokens": settings.max_tokens, "temperature": settings.temperature}
        question = {"prompt": prompt.content} if as_text else {"messages": prompt.messages}
        route = "completions" if as_text else "chat/completions"
        content = await self._post(route, question | limits | {"seed": seed} | self._em_serve_fields)
        text, details = read_output(content, as_text, self._place)
        return text, details | (self._tokenizer if "token_ids" in details else {})

    async def _recognise(self) -> None:
        """Find out if this is em-serve, which reports entropies and token ids, and which tokenizer it has."""
        described = await self._client.get(self._address("em_inf"))
        if described.status_code != 200 or not isinstance(_json(described), dict):
            return
        self._em_serve_fields = {"em_inf": {"method": "none", "stats": "summary"}, "return_token_ids": True}
        body = {"model": self._settings.model, "prompt": PROBE, "add_special_tokens": False}
        above = self._root.path.removesuffix("/v1")
        tokenized = _json(await self._client.post(self._root.copy_with(path=f"{above}/tokenize"), json=body))
        if isinstance(tokenized, dict) and isinstance(tokenized.get("tokens"), list):
            self._tokenizer = {"tokenizer": fingerprint(tokenized["tokens"])}

    async def _post(self, route: str, body: dict[str, Any]) -> bytes:
        """Return what the server answers with status 200; retry while it is busy or restarting."""
        for attempt in range(MAX_ATTEMPTS):
            is_last = attempt == MAX_ATTEMPTS - 1
            try:
                response = await self._client.post(self._address(route), json=body)
            except httpx.HTTPError as error:
                if is_last:
                    raise InputError(f"{self._place}; it stopped answering: {_explain(error)}") from None
            else:
                if response.status_code == 200:
                    return response.content
                if is_last or response.status_code not in RETRIED_STATUSES:
                    raise InputError(f"{self._place}; it says {response.status_code}: {_error_message(response)}")
            await asyncio.sleep(FIRST_RETRY_DELAY_S * 2**attempt)
        raise AssertionError("unreachable")

    def _address(self, route: str) -> httpx.URL:
        return self._root.copy_with(path=f"{self._root.path}/{route}")


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Usage(BaseModel):
    completion_tokens: int | None = None


class _Entropy(BaseModel, allow_inf_nan=False):
    entropy_before: float | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None
    em_inf: list[_Entropy] | None = None


def read_output(content: bytes, as_text: bool, place: str) -> ReadOutput:
    """Return the first choice of a completion, or with `as_text` of a text completion, without what it does not tell.

    Raises:
        InputError: if `content` is no such completion; begins with `place`.
    """
    try:
        completion = _Completion.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(f"{place}; it answered no completion: {field and field + ': '}{first['msg']}") from None
    choice = completion.choices[0]
    if choice.text is None if as_text else choice.message is None:
        raise InputError(f"{place}; it answered no completion: choices.0 has no {'text' if as_text else 'message'}")
    text = choice.text if as_text else choice.message and choice.message.content
    counted = completion.usage.completion_tokens if completion.usage else None
    details = {
        "finish_reason": choice.finish_reason,
        "tokens": len(choice.token_ids) if counted is None and choice.token_ids else counted,
        "token_ids": choice.token_ids or None,
        "entropy": completion.em_inf[0].entropy_before if completion.em_inf else None,
    }
    return text or "", {name: value for name, value in details.items() if value is not None}


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _error_message(response: httpx.Response) -> str:
    content = _json(response)
    error = content.get("error") if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message or response.text[:200]).split())


def _explain(error: httpx.HTTPError) -> str:
    """Return what went wrong on the way to the server, with what to do if it is TLS."""
    text = str(error) or type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"its certificate is not trusted; $SSL_CERT_FILE names the authorities to trust: {text}"
    if "[SSL" in text:
        return f"it does not speak TLS; is it http:// instead of https://? {text}"
    if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):  # a port with TLS ends the connection so
        return f"it does not speak HTTP; is it https:// instead of http://? {text}"
    return text
