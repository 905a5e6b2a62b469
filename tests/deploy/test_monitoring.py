"""Rules, dashboard and runbooks: each on its own, and checked against each other and the exported metrics."""

import itertools
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_fastapi_instrumentator import metrics as instrumentator

from server.stats.metrics import Metrics
from server.strategies.metrics import StrategyMetrics
from tests.deploy.monitoring import MONITORING, PROMTOOL, names, needs_promtool, panels, queries, rules

RUNBOOKS = MONITORING.parents[1] / "docs" / "runbooks.md"
TESTS = sorted(MONITORING.glob("*.test.yaml"))
PLACEHOLDER = "REPOSITORY/"
SERIES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
ALERTS = [rule for rule in rules() if "alert" in rule]
ALERT_NAMES = list(dict.fromkeys(rule["alert"] for rule in ALERTS))


def promtool(*arguments: Any) -> None:
    """Run promtool, which must exit with 0."""
    done = subprocess.run([str(PROMTOOL), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", MONITORING / "rules.yaml")


@pytest.mark.slow  # promtool evaluates all rules over hours and days of samples: 12 and 5 s of CPU time
@needs_promtool
@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_alerts_fire_when_they_should_and_only_then(file: Path) -> None:
    promtool("test", "rules", file)


def test_every_alert_fires_in_a_promtool_test() -> None:
    tests = [test for file in TESTS for test in yaml.safe_load(file.read_text())["tests"]]
    checks = [check for test in tests for check in test.get("alert_rule_test", [])]
    fired = {(check["alertname"], alert["exp_labels"]["severity"]) for check in checks for alert in
             check.get("exp_alerts", [])}  # fmt: skip
    assert fired == {(rule["alert"], rule["labels"]["severity"]) for rule in ALERTS}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: f"{rule['alert']}-{rule['labels']['severity']}")
def test_an_alert_has_its_annotations_and_a_runbook(rule: dict[str, Any]) -> None:
    assert rule["labels"].keys() == {"severity"} and rule["labels"]["severity"] in ("critical", "warning")
    assert re.fullmatch(r"\d+[mh]", rule["for"])
    annotations = rule["annotations"]
    assert annotations.keys() == {"summary", "description", "runbook_url"}
    assert "$value" in annotations["description"]
    assert annotations["runbook_url"] == f"{PLACEHOLDER}docs/runbooks.md#{rule['alert'].lower()}"


def test_every_alert_has_one_runbook() -> None:
    assert re.findall(r"^## (EmInf\w+)$", RUNBOOKS.read_text(), re.MULTILINE) == ALERT_NAMES


def test_a_runbook_has_all_parts() -> None:
    for section in RUNBOOKS.read_text().split("\n## ")[1:]:
        title = section.split("\n", 1)[0]
        for part in ("**Means.**", "**Look.**", "**Causes.**", "**Do.**", "**Silence.**"):
            assert section.count(part) == (1 if title.startswith("EmInf") else 0), (title, part)


def runbook_queries() -> list[str]:
    """Return the queries of all runbooks, one per line of their promql blocks."""
    blocks = re.findall(r"```promql\n(.*?)```", RUNBOOKS.read_text(), re.DOTALL)
    return [query for block in blocks for query in block.strip().split("\n")]


@needs_promtool
def test_every_query_parses(tmp_path: Path) -> None:
    written = [*queries(rate_interval="5m"), *runbook_queries()]
    assert len(queries("5m")) > 40 and len(runbook_queries()) > len(ALERT_NAMES)
    rules = [{"record": f"query:{i}", "expr": query} for i, query in enumerate(written)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", file)


def exported() -> set[str]:
    """Return the names of all series that a server can export: ours, vLLM's and its HTTP instrumentation's."""
    registry = CollectorRegistry()
    Metrics("m", registry)
    StrategyMetrics("m", ["x"], registry)
    instrumentator.default(registry=registry)
    kinds = [(family.name, family.type) for family in registry.collect()]
    vllm = find_spec("vllm")  # locates vLLM without importing it
    assert vllm and vllm.origin
    logger = Path(vllm.origin).parent / "v1" / "metrics" / "loggers.py"
    found = re.findall(r'_(gauge|counter|histogram)_cls\(\s*name="(vllm:\w+)"', logger.read_text())
    assert len(found) > 30
    kinds += [(name, kind) for kind, name in found]
    return {name + suffix for name, kind in kinds for suffix in SERIES.get(kind, ("",))}


def test_every_queried_metric_exists() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    asked = set().union(*(names(rule["expr"]) for rule in rules()), *map(names, [*queries("5m"), *runbook_queries()]))
    assert asked - exported() - recorded == {"up"}  # Prometheus itself makes it
    assert recorded <= asked, "a recorded series is not used"


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        (
            'sum by (a) (rate(x_total{le="y_total", z=~"b"}[5m])) and on (b) group_left (c) d offset 1w',
            {"x_total", "d"},
        ),
        (
            "histogram_quantile(0.9, sum without (e) (vllm:f_bucket)) > bool 1e3 or 0 * absent(g)",
            {"vllm:f_bucket", "g"},
        ),
        ("h:i:rate5m / ignoring (j) k unless -Inf < l", {"h:i:rate5m", "k", "l"}),
    ],
)
def test_names_finds_the_metrics_of_a_query(query: str, wanted: set[str]) -> None:
    assert names(query) == wanted


def test_the_dashboard_is_what_its_generator_writes() -> None:
    script = MONITORING / "dashboard.py"
    made = subprocess.run([sys.executable, str(script), "-"], capture_output=True, text=True, check=True).stdout
    assert made == script.with_suffix(".json").read_text(), f"run {script.name}"


def test_panels_do_not_overlap() -> None:
    everything = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    covered = [
        (x, y)
        for position in (panel["gridPos"] for panel in everything)
        for x, y in itertools.product(
            range(position["x"], position["x"] + position["w"]), range(position["y"], position["y"] + position["h"])
        )
    ]
    assert len(set(covered)) == len(covered)
    assert max(x for x, _ in covered) == 23  # Grafana's page is 24 wide
    assert [panel["title"] for panel in everything if panel["type"] == "row"] == [
        *("Objectives", "Throughput", "Queue and cache", "Entropy", "Strategies")
    ]


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_is_described_and_its_queries_use_the_variables(panel: dict[str, Any]) -> None:
    assert panel["title"] and panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in (
        *("s", "none", "short", "reqps", "percentunit", "suffix:nats", "suffix:tokens/s"),
    )
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        selectors = re.findall(r"\{([^{}]*)\}", target["expr"])
        assert selectors and all('namespace=~"$namespace"' in selector for selector in selectors)
        assert all("$model" in selector or "job" in selector for selector in selectors)
        assert "[5m]" not in target["expr"] and target["legendFormat"]


def test_every_variable_also_matches_a_missing_label() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    source, *choices = dashboard["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert {choice["name"] for choice in choices} == {"namespace", "model"}
    assert all(choice["allValue"] == ".*" and choice["current"]["value"] == ["$__all"] for choice in choices)
    used = {name for query in queries("") for name in re.findall(r"\$(\w+)", query)}
    assert used == set(), "queries() replaces all variables"
