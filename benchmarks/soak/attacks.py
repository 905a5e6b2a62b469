"""The attacks on a running server, each of which fills a row: fuzz, disconnects, slow readers, many requests.

What they send follows from a seed alone. Each begins and ends with a server on which nothing runs.
"""

import contextlib
import itertools
import json
import random
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.soak.cases import Cases
from benchmarks.soak.exchange import ANSWERED, BROKEN, CHAT, GONE, PROMPT, Case, Outcome, Target
from benchmarks.soak.probe import Probe
from benchmarks.soak.report import Row

PARALLEL = 8
BATCH = 200  # requests between two looks at the clock
LONG: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True, "temperature": 1}
STRATEGIES: list[dict[str, Any]] = [
    {},
    {"strategy": {"type": "self_consistency", "n": 4}},
    {"strategy": {"type": "self_consistency", "n": 6, "parallel": 2, "early_stop": True}},
    {"strategy": {"type": "refinement", "rounds": 3}},
    {"strategy": {"type": "deepconf", "n": 4, "warmup": 2}},
    {"em_inf": {"stats": "tokens"}, "n": 3},
]


@dataclass(frozen=True)
class Size:
    """How much an attack sends: this many requests, or fewer if the time is over before."""

    requests: int
    limit_s: float = 3600.0


@contextlib.contextmanager
def attack(target: Target, name: str) -> Iterator[Row]:
    """Yield an attack's row; look at the server before, while and after."""
    row = Row(name)
    if left := target.until_idle():
        row.problems.append(f"before: {left}")
    known = target.known_answers()
    with Probe(target.url) as probe:
        yield row
    row.probed(probe.answers)
    begun = time.monotonic()
    if left := target.until_idle():
        row.problems.append(left)
    row.notes.append(f"idle {time.monotonic() - begun:.0f} s later")
    if (now := target.known_answers()) != known:
        row.problems.append(f"wrong answer afterwards: {now}, before: {known}")


def send_all(target: Target, row: Row, cases: Iterable[Case], size: Size, parallel: int = PARALLEL) -> None:
    """Send cases, some at a time, and count how they end."""
    begun = time.monotonic()
    sent = itertools.islice(cases, size.requests)
    with ThreadPoolExecutor(parallel) as pool:
        while (batch := list(itertools.islice(sent, BATCH))) and time.monotonic() - begun < size.limit_s:
            for outcome in pool.map(target.send, batch):
                row.add(outcome)


def fuzz_alone(target: Target, size: Size, seed: int = 1) -> Row:
    """Send our fields alone, good and hostile."""
    with attack(target, "our fields alone") as row:
        send_all(target, row, Cases(seed).alone(), size)
    return row


def fuzz_combined(target: Target, size: Size, seed: int = 2) -> Row:
    """Send our fields together with vLLM's."""
    with attack(target, "our fields with vLLM's") as row:
        send_all(target, row, Cases(seed).combined(), size)
    return row


def disconnects(target: Target, size: Size, seed: int = 3) -> Row:
    """Go away in every phase of a request, half of the time by RST; then ask for all places of strategies."""
    chance = random.Random(seed)
    plans = [
        (chance.choice(STRATEGIES), chance.random() < 0.5, chance.random() < 0.5, chance.random(), chance.random() / 2)
        for _ in range(size.requests)
    ]
    with attack(target, "disconnects, half by RST") as row, ThreadPoolExecutor(4 * PARALLEL) as pool:
        for outcome in pool.map(lambda plan: _vanish(target, *plan), plans):
            row.add(outcome)
    return row


def _vanish(target: Target, fields: dict[str, Any], stream: bool, reset: bool, share: float, wait_s: float) -> Outcome:
    """Send a part or all of a request, read what comes within `wait_s`, and go."""
    with raw_request(target, fields | {"stream": stream}, whole=share > 0.2) as connection:
        connection.settimeout(wait_s)
        with contextlib.suppress(OSError):
            while connection.recv(4096) and share < 0.8:
                pass
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return Outcome(GONE)


@contextlib.contextmanager
def raw_request(target: Target, fields: dict[str, Any], whole: bool = True) -> Iterator[socket.socket]:
    """Send a long chat request, or half of one, by a connection that is closed at the end of the block."""
    data = json.dumps({"model": "demo"} | PROMPT[CHAT] | LONG | fields).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: soak\r\nContent-Length: {len(data)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in target.headers.items()) + "\r\n"
    url = urlsplit(target.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((url.hostname, url.port))
        connection.sendall(head.encode() + (data if whole else data[: len(data) // 2]))
        yield connection


def all_places(target: Target, size: Size) -> Row:
    """Take every place for strategies at once: one that was lost before is missing now."""
    vote = {"strategy": {"type": "self_consistency", "n": 64}, "max_tokens": 2, "temperature": 1}
    cases = [Case(CHAT, {"model": "demo", "seed": number} | PROMPT[CHAT] | vote) for number in range(size.requests)]
    with attack(target, f"{64 * size.requests} places") as row:
        send_all(target, row, cases, size, parallel=size.requests)
        if row.counts[ANSWERED] != size.requests:
            row.problems.append(
                f"of {size.requests} votes of 64, {row.counts[ANSWERED]} were answered: places are lost"
            )
    return row


def slow_readers(target: Target, size: Size, seed: int = 4) -> Row:
    """Leave streams unread, ask for something else meanwhile, and wait until the engine is idle with them open."""
    chance = random.Random(seed)
    body: dict[str, Any] = {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 60}
    with attack(target, "streams that nobody reads") as row, contextlib.ExitStack() as stack:
        for _ in range(size.requests):
            stack.enter_context(raw_request(target, body | chance.choice(STRATEGIES)))
            row.add(Outcome(GONE))
        row.add(target.send(Case(CHAT, {"model": "demo", "max_tokens": 4} | PROMPT[CHAT])))
        begun = time.monotonic()
        left = target.until_idle()
        row.notes.append(f"branches over after {time.monotonic() - begun:.0f} s")
        if left:
            row.problems.append(f"with streams open: {left}")
    return row


def many(target: Target, size: Size, growth_mib: float, warm_up: int, seed: int = 5) -> Row:
    """Send good requests, one in twenty of which goes away; compare memory after a warm-up and at the end."""
    cases = Cases(seed).good()
    chance = random.Random(seed)

    def send(case: Case) -> Outcome:
        if chance.random() < 0.05:
            return _vanish(target, chance.choice(STRATEGIES), True, False, 1.0, 0.05)
        outcome = target.send(case)
        if outcome.kind == ANSWERED or outcome.problem:
            return outcome
        return Outcome(BROKEN, f"a good request got {outcome.kind}: {case.body}")

    def send_many(row: Row, number: int) -> None:
        begun = time.monotonic()
        with ThreadPoolExecutor(2 * PARALLEL) as pool:
            while number > 0 and time.monotonic() - begun < size.limit_s:
                for outcome in pool.map(send, itertools.islice(cases, min(BATCH, number))):
                    row.add(outcome)
                number -= BATCH

    with attack(target, "many requests") as row:
        send_many(row, warm_up)
        before = target.memory()
        send_many(row, size.requests - warm_up)
    target.until_idle()
    check_memory(row, before, target.memory(), growth_mib)
    return row


def check_memory(row: Row, before: dict[str, float], after: dict[str, float], growth_mib: float) -> None:
    """Note what each process held before and after; growth above the bound is a problem."""
    for name in sorted(before):
        row.notes.append(f"{name} {before[name]:.0f} -> {after[name]:.0f} MiB")
        if after[name] - before[name] > growth_mib:
            row.problems.append(f"{name} grew by {after[name] - before[name]:.0f} MiB; the bound is {growth_mib:.0f}")
