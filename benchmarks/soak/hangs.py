"""Reproducers of one request that stops the others: what `/health/live` took meanwhile, and the memory."""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx

from benchmarks.soak.calls import CHAT, MEBIBYTE, chat, http, resident
from benchmarks.soak.probe import Probe
from benchmarks.soak.strangers import Strangers
from harness.launch import Server
from harness.ports import free_port

STATISTICS_ADDRESS = f"127.0.0.1:{free_port()}"


def probed(server: Server, send: Callable[[], httpx.Response]) -> str:
    """Send something, and say what came of it while `/health/live` was asked."""
    before, begun = resident(server), time.monotonic()
    with Probe(server.url) as probe:
        response = send()
    took, grown = time.monotonic() - begun, resident(server) - before
    slowest = probe.answers.slowest_s
    return f"status {response.status_code} after {took:.1f} s; slowest probe {slowest:.2f} s; memory {grown:+.0f} MiB"


def slow_pattern(server: Server) -> str:
    """Match a pattern that takes quadratic time, on replies whose text the client chose."""
    with http(server) as client:
        token = client.post("/tokenize", json={"model": "demo", "prompt": "7"}).json()["tokens"][0]
    answer = {"type": "regex", "pattern": "(?:.{0,60}){0,15}z|."}
    strategy = {"type": "self_consistency", "n": 3, "answer": answer}
    fields: dict[str, Any] = {"max_tokens": 950, "ignore_eos": True, "allowed_token_ids": [token], "temperature": 1}
    return probed(server, lambda: chat(server, strategy=strategy, **fields))


def many_log_probabilities(server: Server) -> str:
    """Let deepconf ask for 20 candidates of every token of 64 long branches."""
    strategy = {"type": "deepconf", "n": 64, "warmup": 63, "top": 20}
    return probed(server, lambda: chat(server, strategy=strategy, max_tokens=1000, ignore_eos=True, temperature=1))


def huge_objects(server: Server) -> str:
    """Send a million unknown keys, and 20 MB that every branch gets a copy of."""
    unknown = {f"k{i}": 0 for i in range(1_000_000)}
    vote: dict[str, Any] = {"type": "self_consistency", "n": 64}
    sent = {
        "em_inf": lambda: chat(server, em_inf=unknown),
        "strategy": lambda: chat(server, strategy=unknown),
        "vllm_xargs": lambda: chat(server, strategy=vote, vllm_xargs={"x": "a" * 20_000_000}, max_tokens=2),
    }
    return " | ".join(f"{name}: {probed(server, send)}" for name, send in sent.items())


def worst_validations(server: Server) -> str:
    """Send what takes the validation longest within the limits on a body and its items."""
    sent: dict[str, tuple[str, dict[str, Any]]] = {
        "1,000 wrong parts": ("responses", {"input": [{"role": "user", "content": [{}] * 1_000}]}),
        "20,000 messages": ("chat/completions", {"messages": CHAT * 6_600}),
        "16 MiB of text": ("chat/completions", {"messages": [{"role": "user", "content": "1+" * 8_000_000}]}),
        "a million token ids": ("completions", {"prompt": [5] * 999_000}),
        "199,000 names": ("chat/completions", {"messages": CHAT} | {f"field{i}": 0 for i in range(199_000)}),
        "199,000 arrays": ("chat/completions", {"messages": CHAT, "em_inf": [[]] * 199_000}),
        "199,000 tools": ("chat/completions", {"messages": CHAT, "tools": [{}] * 199_000}),
        "16 MiB of arrays": ("chat/completions", {"messages": CHAT, "em_inf": [[]] * 3_900_000}),
    }

    def post(path: str, fields: dict[str, Any]) -> httpx.Response:
        content = json.dumps({"model": "demo", "max_tokens": 2} | fields, separators=(",", ":"))
        with http(server) as client:
            return client.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"})

    return " | ".join(f"{name}: {probed(server, partial(post, *what))}" for name, what in sent.items())


def flood_of_statistics(server: Server) -> str:
    """Let three strangers send messages of 1 byte to the statistics socket, beside one request."""
    strangers = Strangers(STATISTICS_ADDRESS)
    with strangers.flooding(3):
        said = probed(server, lambda: chat(server, em_inf={"stats": "summary"}, max_tokens=500, ignore_eos=True))
    return f"{said}; {strangers.connections} connections, {strangers.taken / MEBIBYTE:.0f} MiB left"


def statistics_without_end(server: Server) -> str:
    """Let a stranger send one message of up to 480 MiB, that never ends, to the statistics socket."""

    def wait_and_chat() -> httpx.Response:
        time.sleep(10)
        return chat(server, max_tokens=2)

    strangers = Strangers(STATISTICS_ADDRESS)
    with strangers.never_ending():
        said = probed(server, wait_and_chat)
    return f"{said}; {strangers.connections} connections, {strangers.taken / MEBIBYTE:.0f} MiB left"
