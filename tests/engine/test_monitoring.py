"""deploy/monitoring's rules and dashboard queries in a real Prometheus that scrapes a real server."""

import json
import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.monitoring import groups, names, queries, rules
from tests.engine.launch import HANG_LIMIT_S, Server
from tests.engine.prometheus import Prometheus, load, needs_prometheus, scraping

pytestmark = pytest.mark.engine

JOB = "em-inf-server"


def write_fast_rules(folder: Path) -> str:
    """Write the rules to a file, to be evaluated every two seconds instead of every minute; return its name."""
    file = folder / "rules.json"  # JSON is YAML too
    file.write_text(json.dumps({"groups": [group | {"interval": "2s"} for group in groups()]}))
    return file.name


def evaluated_rules(prometheus: Prometheus) -> list[dict[str, Any]]:
    """Wait until Prometheus has evaluated every rule again; return the rules."""
    start = time.time()
    while True:
        found = prometheus.http.get("/api/v1/rules").json()["data"]["groups"]
        if found and all(datetime.fromisoformat(group["lastEvaluation"]).timestamp() > start for group in found):
            return [rule for group in found for rule in group["rules"]]
        time.sleep(0.2)
        assert time.time() < start + HANG_LIMIT_S, "Prometheus did not evaluate the rules"


@needs_prometheus
def test_rules_and_dashboard_on_a_server_under_load(v1: Server, tmp_path: Path) -> None:
    with scraping(v1, tmp_path, JOB, rule_files=[write_fast_rules(tmp_path)]) as prometheus:
        load(v1, ["none"], 12, at_once=3)
        prometheus.next_scrape()
        load(v1, ["none"], 60, at_once=3)
        v1.until(lambda: v1.metric("em_inf_tracked_requests") == 0)  # all stats have arrived
        prometheus.next_scrape()
        found = evaluated_rules(prometheus)

        assert len(found) == len(rules())
        assert [(rule["name"], rule["lastError"]) for rule in found if rule["health"] != "ok"] == []
        # Rules over hours and days have values too, of the data so far; those listed here need 10,000 tokens first.
        recorded = {rule["name"] for rule in found if rule["type"] == "recording" and prometheus.query(rule["name"])}
        assert {rule["record"] for rule in rules() if "record" in rule} - recorded <= {
            *(
                "em_inf:entropy_before_nats:mean6h",
                "em_inf:optimized_tokens:share1h",
                "em_inf:optimized_tokens:share1d",
            ),
            "em_inf:requests_bad_enough:6h",
        }
        served = {one["metric"]["sli"] for one in prometheus.query("em_inf:requests:rate5m > 0")}
        assert served == {"first_token", "http", "em_inf"}
        assert {one["value"][1] for one in prometheus.query('em_inf:budget_burn:1h{sli!="first_token"}')} == {"0"}
        assert 0 < float(prometheus.query("em_inf:transform:share5m")[0]["value"][1]) < 1

        # The server works, so none of these alerts may be pending or firing.
        alerts = {
            alert["labels"]["alertname"] for alert in prometheus.http.get("/api/v1/alerts").json()["data"]["alerts"]
        }
        assert not alerts & {"EmInfNoServerUp", "EmInfServerDown", "EmInfEngineStalled", "EmInfErrorBudgetBurn"}

        # With the model chosen, no panel of the dashboard is empty.
        assert [query for query in queries("1m", model="demo") if not prometheus.query(query)] == []


def test_the_metrics_page_has_what_the_rules_and_the_dashboard_use(v1: Server) -> None:
    v1.http.post("/v1/completions", json={"model": "demo", "prompt": "1", "max_tokens": 1}).raise_for_status()
    page = httpx.get(f"{v1.url}/metrics", timeout=HANG_LIMIT_S).text
    exported = {line.split("{")[0].split(" ")[0] for line in page.splitlines() if not line.startswith("#")}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = set().union(*(names(rule["expr"]) for rule in rules()), *map(names, queries("5m")))
    assert used - recorded - {"up"} - exported == set()
    (bound,) = {found for rule in rules() for found in re.findall(r'le="([^"]+)"', rule["expr"])}
    assert (
        f'vllm:time_to_first_token_seconds_bucket{{engine="0",le="{bound}"' in page
    )  # the objective is a bucket's bound
