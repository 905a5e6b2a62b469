"""One request to a server under attack, and what is right and wrong with the response.

A 5xx is vLLM's own if the same body without our fields gets the same status; otherwise it is ours.
"""

import contextlib
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

ANSWERED, REFUSED, OURS, VLLMS, BROKEN, GONE = "2xx", "4xx", "5xx ours", "5xx vLLM's", "broken streams", "given up"
KINDS = (ANSWERED, REFUSED, OURS, VLLMS, BROKEN, GONE)
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
PROMPT: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "12+7*3-4"}]},
    COMPLETIONS: {"prompt": "12+7*3-4="},
    RESPONSES: {"input": "12+7*3-4"},
}
OUR_FIELDS = ("em_inf", "strategy")
RESPONSES_ENDS = ("response.completed", "response.incomplete", "response.failed")
# What json.dumps cannot write, or what Python's parser would not read: put in when the body is text.
RAW = {
    '"@deep@"': "[" * 100_000 + "]" * 100_000,
    '"@digits@"': "9" * 5_000,
    '"@exponent@"': "1e400",
}
TLS = ssl.create_default_context()  # made once: each client would take 55 ms to make its own, unused as it is
LIMIT_S = 300.0
IDLE_LIMIT_S = 240.0
BUSY = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "em_inf_strategy_branches_running",
    "em_inf_tracked_requests",
)


@dataclass(frozen=True)
class Outcome:
    """How one request ended: one of KINDS, and what is wrong with it, if anything is."""

    kind: str
    problem: str = ""


@dataclass(frozen=True)
class Case:
    """One request. `plain`: nothing but our fields can be wrong with it, so a 400 must name one of them."""

    path: str
    body: dict[str, Any]
    plain: bool = False

    def text(self) -> str:
        """Return the body's JSON, or what stands in its place."""
        text = json.dumps(self.body)
        for mark, raw in RAW.items():
            text = text.replace(mark, raw)
        return text

    def without_our_fields(self) -> "Case":
        """Return what plain vLLM would be sent."""
        body = {key: value for key, value in self.body.items() if key not in OUR_FIELDS}
        if isinstance(flat := body.get("vllm_xargs"), dict):
            body["vllm_xargs"] = {key: value for key, value in flat.items() if not key.startswith("em_inf")}
        return Case(self.path, body)


@dataclass
class Target:
    """A server under attack."""

    url: str
    pid: int
    key: str = ""
    headers: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        """Make the headers of every request."""
        self.headers = {"Content-Type": "application/json"}
        if self.key:
            self.headers["Authorization"] = f"Bearer {self.key}"

    def client(self) -> httpx.Client:
        """Return a client of the server."""
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=LIMIT_S, verify=TLS)

    def send(self, case: Case) -> Outcome:
        """Send one request and judge the response."""
        outcome = self._send(case)
        if outcome.kind in (OURS, BROKEN) and self._send(case.without_our_fields()).kind == outcome.kind:
            return Outcome(VLLMS)
        return outcome

    def _send(self, case: Case) -> Outcome:
        """Send by a connection of its own: after some faults, vLLM's server closes the one that they came by."""
        with self.client() as client:
            return _judged(client, case)

    def metrics(self) -> dict[str, float]:
        """Return each metric's sum over its series."""
        sums: dict[str, float] = {}
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        for line in lines:
            if not line.startswith("#"):
                name = line.partition("{")[0].partition(" ")[0]
                sums[name] = sums.get(name, 0.0) + float(line.split()[-1])
        return sums

    def until_idle(self) -> str:
        """Wait until nothing runs, waits or is tracked. Return what is left if that does not happen."""
        deadline = time.monotonic() + IDLE_LIMIT_S
        while True:
            metrics = self.metrics()
            busy = {name: metrics[name] for name in BUSY if metrics.get(name)}
            if not busy:
                return ""
            if time.monotonic() > deadline:
                return f"not idle after {IDLE_LIMIT_S:.0f} s: {busy}"
            time.sleep(0.5)

    def known_answers(self) -> list[str]:
        """Return the answers to a greedy and to a seeded request, which no attack may change."""
        bodies: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1, "seed": 7, "em_inf": True}]
        with self.client() as client:
            sent = [client.post(CHAT, json={"model": "demo"} | PROMPT[CHAT] | body) for body in bodies]
        return [f"{each.status_code} {each.json()['choices'][0]['message']['content']}" for each in sent]

    def memory(self) -> dict[str, float]:
        """Return the MiB that each of the server's processes holds."""
        root = psutil.Process(self.pid)
        processes = {"API server": root} | {_name(child): child for child in root.children(recursive=True)}
        return {name: process.memory_info().rss / 2**20 for name, process in processes.items() if name}


def _name(process: psutil.Process) -> str:
    """Return a name for vLLM's processes: it calls them VLLM::EngineCore and VLLM::Worker."""
    with contextlib.suppress(psutil.Error):
        for name in ("EngineCore", "Worker"):
            if name in " ".join(process.cmdline()):
                return name
    return ""


def _judged(client: httpx.Client, case: Case) -> Outcome:
    try:
        response = client.post(case.path, content=case.text())
    except httpx.HTTPError as error:
        return _wrong(BROKEN, case, repr(error))
    if response.status_code >= 500:
        return _wrong(OURS, case, f"{response.status_code} {response.text[:200]}")
    try:
        if response.status_code >= 400:
            return _refused(case, _strict(response.text), response.status_code)
        if response.headers["content-type"].startswith("text/event-stream"):
            return _streamed(case, response.text)
        _strict(response.text)
    except ValueError as error:
        return _wrong(BROKEN, case, str(error))
    return Outcome(ANSWERED)


def _refused(case: Case, body: Any, status: int) -> Outcome:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not {"message", "type", "param", "code"} <= set(error) or error["code"] != status:
        return _wrong(REFUSED, case, f"{status} not in OpenAI's shape: {body}")
    if case.plain and status == 400 and not isinstance(error["param"], str):
        return _wrong(REFUSED, case, f"400 without the field's name: {error}")
    return Outcome(REFUSED)


def _streamed(case: Case, text: str) -> Outcome:
    """Judge a stream: JSON in every event, an error's status, and the end that its route has."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    parsed = [_strict(event) for event in events if event != "[DONE]"]
    errors = [event["error"] for event in parsed if isinstance(event.get("error"), dict)]
    if errors:
        status = errors[0].get("code")
        return _wrong(OURS, case, f"in a stream: {errors[0]}") if status is None or status >= 500 else Outcome(REFUSED)
    ended = parsed and parsed[-1].get("type") in RESPONSES_ENDS if case.path == RESPONSES else events[-1:] == ["[DONE]"]
    return Outcome(ANSWERED) if ended else _wrong(BROKEN, case, f"no end: {text[-200:]}")


def _wrong(kind: str, case: Case, what: str) -> Outcome:
    return Outcome(kind, f"{case.path} {json.dumps(case.body)[:600]}: {what}")


def _strict(text: str) -> Any:
    """Parse JSON, which has no NaN and no Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON: {text[:300]}")

    return json.loads(text, parse_constant=refuse)


def until(true: Callable[[], bool], limit_s: float, every_s: float = 0.2) -> bool:
    """Wait for something; return whether it came true."""
    deadline = time.monotonic() + limit_s
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(every_s)
    return found
