"""The rules and the dashboard of deploy/monitoring, parsed for the tests here and in tests/engine."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
PROMTOOL = shutil.which("promtool", path=Path(sys.executable).parent) or shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool: see scripts/test-tools.sh")

# The parts of a PromQL query without metric names: strings, label matchers, ranges, label lists; then its keywords.
NOT_NAMES = (r'"[^"]*"', r"\{[^}]*\}", r"\[[^]]*\]", r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
WORDS = {"and", "or", "unless", "by", "without", "offset", "bool", "Inf", "NaN"}


def groups() -> list[dict[str, Any]]:
    """Return the rule groups of rules.yaml."""
    found: list[dict[str, Any]] = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
    return found


def rules() -> list[dict[str, Any]]:
    """Return the rules of all groups."""
    return [rule for group in groups() for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """Return the panels of the dashboard, without its rows."""
    everything = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    return [panel for panel in everything if panel["type"] != "row"]


def queries(rate_interval: str, model: str = ".*") -> list[str]:
    """Return the dashboard's queries as Grafana sends them, for all namespaces and the models that match `model`."""
    values = {"$__rate_interval": rate_interval, "$namespace": ".*", "$model": model}
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    for name, value in values.items():
        found = [query.replace(name, value) for query in found]
    return found


def names(query: str) -> set[str]:
    """Return the names of the metrics in a query."""
    for pattern in NOT_NAMES:
        query = re.sub(pattern, " ", query)
    words = re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*\b(?!\s*\()", query)
    return set(words) - WORDS
