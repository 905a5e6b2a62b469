"""A real Prometheus beside a server under load, and what its counters have to be."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness.ports import free_port
from tests.engine.launch import Server
from tests.engine.support import ADAPTIVE, EM, UNSURE, post

BIN = Path(sys.executable).parent
PROMETHEUS, PROMTOOL = (shutil.which(tool, path=BIN) or shutil.which(tool) for tool in ("prometheus", "promtool"))
needs_prometheus = pytest.mark.skipif(not (PROMETHEUS and PROMTOOL), reason="no prometheus: see scripts/test-tools.sh")

METHODS = {"em_inf": EM | {"steps": 7}, "adaptive_temperature": ADAPTIVE, "none": {"method": "none"}}
# A row of float32 logits depends on the rest of its batch in the last bits, and a token near a threshold with it.
NEARLY = 0.01


class Prometheus:
    """A running Prometheus that scrapes one server twice a second."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30)

    def scraped(self) -> Counter[tuple[str, str]]:
        """Our series as of the next scrape, summed by name and method (without one: by outcome, or "")."""
        asked = time.time()
        while float(([*self.query("timestamp(up)")] or [{"value": [0, 0]}])[0]["value"][1]) < asked:
            time.sleep(0.1)
            assert time.time() < asked + 30, "no scrape came"
        sums: Counter[tuple[str, str]] = Counter()
        for series in self.query('{__name__=~"em_inf_.*"}'):
            labels = series["metric"]
            key = labels.get("outcome", labels.get("method", "")) if "le" not in labels else "buckets"
            sums[labels["__name__"], key] += float(series["value"][1])
        return sums

    def query(self, query: str) -> list[dict[str, Any]]:
        """The series that answer it now."""
        result: list[dict[str, Any]] = self.http.get("/api/v1/query", params={"query": query}).json()["data"]["result"]
        return result


@contextlib.contextmanager
def scraping(server: Server, folder: Path, name: str = "em", **config: Any) -> Iterator[Prometheus]:
    """Under the job `name`, with what else Prometheus' configuration is to have."""
    target = server.url.removeprefix("http://")
    job = {"job_name": name, "scrape_interval": "500ms", "static_configs": [{"targets": [target]}]}
    (folder / "prometheus.yml").write_text(json.dumps({"scrape_configs": [job]} | config))
    address = f"127.0.0.1:{free_port()}"
    options = ("--config.file", "prometheus.yml", "--storage.tsdb.path", "data", "--web.listen-address", address)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(PROMETHEUS), *options], cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        prometheus = Prometheus(f"http://{address}")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if prometheus.http.get("/-/ready").status_code == 200:
                    break
            time.sleep(0.1)
        yield prometheus
    finally:
        process.terminate()
        process.wait(30)


def load(server: Server, stats: list[str], requests: int = 120) -> list[tuple[str, dict[str, Any]]]:
    """Replies to mixed requests, sixteen at a time, each over its own connection: (method, reply)."""
    bodies = [
        {"prompt": UNSURE, "seed": i, "max_tokens": 5 + i % 40, "ignore_eos": i % 2 == 0, "n": 1 + i % 2}
        | {"em_inf": settings | {"stats": stats[i % len(stats)]}}
        for i, settings in zip(range(requests), list(METHODS.values()) * requests, strict=False)
    ]

    async def one(turn: asyncio.Semaphore, body: dict[str, Any]) -> dict[str, Any]:
        async with turn, server.async_http() as client:
            return await post(client, body)

    async def run() -> list[dict[str, Any]]:
        turn = asyncio.Semaphore(16)
        return await asyncio.gather(*(one(turn, body) for body in bodies))

    methods = [body["em_inf"].get("method", "em_inf") for body in bodies]
    return list(zip(methods, asyncio.run(run()), strict=True))


def summed(replies: list[tuple[str, dict[str, Any]]]) -> Counter[tuple[str, str]]:
    """What the counters have to say of these replies, by name and method."""
    sums: Counter[tuple[str, str]] = Counter({("em_inf_missing_tokens_total", method): 0 for method in METHODS})
    for method, reply in replies:
        for entry in reply["em_inf"]:
            for name in ("tokens", "optimized_tokens", "steps"):
                sums[f"em_inf_{name}_total", method] += entry[name]
            for name in ("before", "after"):
                sums[f"em_inf_entropy_{name}_nats_count", method] += entry["tokens"]
                sums[f"em_inf_entropy_{name}_nats_sum", method] += entry["tokens"] * entry[f"entropy_{name}"]
    return sums


def counters_are_the_sums_over_the_replies(server: Server, folder: Path, requests: int) -> None:
    with scraping(server, folder) as prometheus:
        start = prometheus.scraped()
        replies = load(server, ["summary", "tokens"], requests)
        middle = prometheus.scraped()
        gained, wanted = middle - start, summed(replies)
        rounding = 1e-6 * sum(reply["usage"]["completion_tokens"] for _, reply in replies)
        assert {key: gained[key] for key in wanted} == pytest.approx(wanted, rel=1e-9, abs=rounding)
        assert gained["em_inf_requests_total", "completed"] == requests
        assert gained["em_inf_transform_seconds_total", ""] > 0
        assert middle["em_inf_records_dropped_total", ""] == 0

        # The same without statistics in the replies: the workers send sums, in which every token has its place.
        silent = load(server, ["none"], requests)
        server.until(lambda: server.metric("em_inf_tracked_requests") == 0)
        again = prometheus.scraped() - middle
        assert not any("em_inf" in reply for _, reply in silent)
        for method in METHODS:
            used = sum(reply["usage"]["completion_tokens"] for m, reply in silent if m == method)
            assert again["em_inf_tokens_total", method] == used
        assert {key: again[key] for key in wanted} == pytest.approx(wanted, rel=NEARLY, abs=1)
