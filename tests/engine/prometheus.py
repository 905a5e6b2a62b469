"""A real Prometheus that scrapes a server under load, and the values that its counters must have."""

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
from tests.engine.launch import HANG_LIMIT_S, Server
from tests.engine.support import ADAPTIVE, EM, UNSURE, post

BIN = Path(sys.executable).parent
PROMETHEUS, PROMTOOL = (shutil.which(tool, path=BIN) or shutil.which(tool) for tool in ("prometheus", "promtool"))
needs_prometheus = pytest.mark.skipif(not (PROMETHEUS and PROMTOOL), reason="no prometheus: see scripts/test-tools.sh")

METHODS = {"em_inf": EM | {"steps": 7}, "adaptive_temperature": ADAPTIVE, "none": {"method": "none"}}
SCRAPE_INTERVAL_S = 2
# The last bits of float32 logits depend on the rest of the batch, so a token near a threshold may fall on either side.
RELATIVE_TOLERANCE = 0.01


class Prometheus:
    """A client of a running Prometheus that scrapes one server."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=HANG_LIMIT_S)

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/-/ready").status_code == 200
        return False

    def next_scrape(self) -> Counter[tuple[str, str]]:
        """Wait for the next scrape that succeeds; return its series, summed by name and method (or outcome, or "")."""
        start, scraped_at = time.time(), 0.0
        while scraped_at < start:
            time.sleep(0.1)
            assert time.time() < start + HANG_LIMIT_S, "Prometheus did not scrape"
            scraped_at = max((float(up["value"][1]) for up in self.query("timestamp(up) and up == 1")), default=0.0)
        sums: Counter[tuple[str, str]] = Counter()
        for series in self.query('{__name__=~"em_inf_.*"}', time=scraped_at):
            labels = series["metric"]
            key = labels.get("outcome", labels.get("method", "")) if "le" not in labels else "buckets"
            sums[labels["__name__"], key] += float(series["value"][1])
        return sums

    def query(self, query: str, **params: float) -> list[dict[str, Any]]:
        """Return the series that `query` has now, or at `time`, in seconds since the epoch."""
        response = self.http.get("/api/v1/query", params={"query": query} | params)
        result: list[dict[str, Any]] = response.json()["data"]["result"]
        return result


@contextlib.contextmanager
def scraping(server: Server, folder: Path, name: str = "em", **config: Any) -> Iterator[Prometheus]:
    """Run Prometheus until the block ends, with a job `name` for the server and `config` added to its configuration.

    A scrape may take SCRAPE_INTERVAL_S: Prometheus lets none last longer than its interval.
    """
    target = server.url.removeprefix("http://")
    job = {"job_name": name, "scrape_interval": f"{SCRAPE_INTERVAL_S}s", "static_configs": [{"targets": [target]}]}
    (folder / "prometheus.yml").write_text(json.dumps({"scrape_configs": [job]} | config))
    address = f"127.0.0.1:{free_port()}"
    options = ("--config.file", "prometheus.yml", "--storage.tsdb.path", "data", "--web.listen-address", address)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(PROMETHEUS), *options], cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        prometheus = Prometheus(f"http://{address}")
        server.until(prometheus.is_ready)
        yield prometheus
    finally:
        process.terminate()
        process.wait(HANG_LIMIT_S)


def load(server: Server, stats: list[str], requests: int, at_once: int) -> list[tuple[str, dict[str, Any]]]:
    """Send mixed requests, `at_once` at a time, each over its own connection; return (method, response) of each.

    With their seeds, they sample the same tokens the next time. At most six choices fit into the cache of the shared
    servers (conftest.py): three requests.
    """
    bodies = [
        {"prompt": UNSURE, "seed": i, "max_tokens": 5 + i % 40, "ignore_eos": i % 2 == 0, "n": 1 + i % 2}
        | {"em_inf": settings | {"stats": stats[i % len(stats)]}}
        for i, settings in zip(range(requests), list(METHODS.values()) * requests, strict=False)
    ]

    async def send(limit: asyncio.Semaphore, body: dict[str, Any]) -> dict[str, Any]:
        async with limit, server.async_http() as client:
            return await post(client, body)

    async def send_all() -> list[dict[str, Any]]:
        limit = asyncio.Semaphore(at_once)
        return await asyncio.gather(*(send(limit, body) for body in bodies))

    methods = [body["em_inf"].get("method", "em_inf") for body in bodies]
    return list(zip(methods, asyncio.run(send_all()), strict=True))


def expected_counters(responses: list[tuple[str, dict[str, Any]]]) -> Counter[tuple[str, str]]:
    """Return the sums over these responses, by the counter's name and method."""
    sums: Counter[tuple[str, str]] = Counter({("em_inf_missing_tokens_total", method): 0 for method in METHODS})
    for method, response in responses:
        for summary in response["em_inf"]:
            for name in ("tokens", "optimized_tokens", "steps"):
                sums[f"em_inf_{name}_total", method] += summary[name]
            for name in ("before", "after"):
                sums[f"em_inf_entropy_{name}_nats_count", method] += summary["tokens"]
                sums[f"em_inf_entropy_{name}_nats_sum", method] += summary["tokens"] * summary[f"entropy_{name}"]
    return sums


def check_counters(server: Server, folder: Path, requests: int, at_once: int = 16) -> None:
    """Check that Prometheus' counters grow by the sums over the responses, with and without stats in these."""
    with scraping(server, folder) as prometheus:
        start = prometheus.next_scrape()
        responses = load(server, ["summary", "tokens"], requests, at_once)
        middle = prometheus.next_scrape()
        growth, expected = middle - start, expected_counters(responses)
        rounding = 1e-6 * sum(response["usage"]["completion_tokens"] for _, response in responses)
        assert {key: growth[key] for key in expected} == pytest.approx(expected, rel=1e-9, abs=rounding)
        assert growth["em_inf_requests_total", "completed"] == requests
        assert growth["em_inf_transform_seconds_total", ""] > 0
        assert middle["em_inf_records_dropped_total", ""] == 0

        # The same load without stats in the responses: the workers send totals, which must count every token.
        without_stats = load(server, ["none"], requests, at_once)
        server.until(lambda: server.metric("em_inf_tracked_requests") == 0)
        growth = prometheus.next_scrape() - middle
        assert not any("em_inf" in response for _, response in without_stats)
        for method in METHODS:
            used = sum(response["usage"]["completion_tokens"] for m, response in without_stats if m == method)
            assert growth["em_inf_tokens_total", method] == used
        assert {key: growth[key] for key in expected} == pytest.approx(expected, rel=RELATIVE_TOLERANCE, abs=1)
