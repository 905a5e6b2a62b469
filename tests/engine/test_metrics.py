"""Our metrics as a real Prometheus scrapes them under load. For servers of several processes: test_servers.py."""

import subprocess
from pathlib import Path

import httpx
import pytest

from tests.engine.launch import Server
from tests.engine.prometheus import PROMTOOL, check_counters, needs_prometheus

pytestmark = pytest.mark.engine


@pytest.mark.essential
@needs_prometheus
def test_counters_are_the_sums_over_the_responses(engine: Server, tmp_path: Path) -> None:
    check_counters(engine, tmp_path, requests=90 if engine.runner == "v1" else 12, at_once=3)


@pytest.mark.essential
@needs_prometheus
def test_promtool_has_no_complaints(v1: Server) -> None:
    lines = httpx.get(f"{v1.url}/metrics").text.splitlines(keepends=True)
    ours = [line for line in lines if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith("em_inf_")]
    assert len(ours) > 100
    done = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input="".join(ours), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.essential
def test_requests_are_counted_by_outcome(v1: Server) -> None:
    def count(**labels: str) -> float:
        return v1.metric("em_inf_requests_total", **labels)

    before = [count(method="unknown", outcome="rejected"), count(method="em_inf", outcome="rejected")]
    shared = {"model": "demo", "prompt": "1", "max_tokens": 2}
    assert v1.http.post("/v1/completions", json=shared | {"em_inf": {"threshold": 21}}).status_code == 400
    assert v1.http.post("/v1/completions", json=shared | {"em_inf": True, "max_tokens": 9999}).status_code == 400
    assert v1.http.post("/v1/completions", json=shared | {"em_inf": True, "model": "other"}).status_code == 404
    assert count(method="unknown", outcome="rejected") == before[0] + 1
    assert count(method="em_inf", outcome="rejected") == before[1] + 2
    assert v1.metric("em_inf_tracked_requests") == 0
