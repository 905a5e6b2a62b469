"""Writes dashboard.json, for Grafana 10 or newer: `python deploy/monitoring/dashboard.py`.

A row is a list of panels; a panel is a title, a unit, what it says, and its queries by legend.
"""

import json
import sys
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, ACROSS = 8, 8, 24  # a panel's and the page's, in the units of Grafana's grid
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SERVERS = 'namespace=~"$namespace", job=~".*em-inf-server.*"'  # what has no model: names that other servers have too
VLLM = 'namespace=~"$namespace", model_name=~"$model"'
OURS = 'namespace=~"$namespace", model=~"$model"'
RECORDED = 'namespace=~"$namespace", model=~"$model|"'  # some of rules.yaml's have no model
RATE = "[$__rate_interval]"

Panel = tuple[str, str, str, dict[str, str]]  # title, unit, description, legend -> PromQL


def rate(metric: str, labels: str, by: str) -> str:
    """Increase per second, over all replicas."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}{RATE}))"


def share(part: str, whole: str, labels: str, by: str) -> str:
    """One rate as a share of another."""
    return f"{rate(part, labels, by)} / {rate(whole, labels, by)}"


def mean(histogram: str, labels: str, by: str) -> str:
    """Mean of a histogram's observations."""
    return share(f"{histogram}_sum", f"{histogram}_count", labels, by)


def quantiles(histogram: str, labels: str, by: str, legend: str, *levels: float) -> dict[str, str]:
    """One query for each level."""
    buckets = rate(f"{histogram}_bucket", labels, f"le, {by}")
    return {f"p{100 * level:g} {legend}": f"histogram_quantile({level}, {buckets})" for level in levels}


ROWS: dict[str, list[Panel]] = {
    "Objectives": [
        (
            "Time to first token",
            "s",
            "From a request's arrival, its time in the queue included. The objective: 95 % within 2.5 s.",
            quantiles("vllm:time_to_first_token_seconds", VLLM, "model_name", "{{model_name}}", 0.5, 0.95, 0.99),
        ),
        (
            "Time between tokens",
            "s",
            "Of each pair of tokens that follow one another, and the mean over a whole reply.",
            quantiles("vllm:inter_token_latency_seconds", VLLM, "model_name", "{{model_name}}", 0.5, 0.95, 0.99)
            | quantiles(
                "vllm:request_time_per_output_token_seconds", VLLM, "model_name", "{{model_name}}, of a reply", 0.95
            ),
        ),
        (
            "Failed requests",
            "percentunit",
            "http: 5xx of all models. em_inf: requests with a method, broken streams too. The objective: below 0.5 %.",
            {
                "{{sli}} {{job}} {{model}}": f'em_inf:requests_bad:rate5m{{sli!="first_token", {RECORDED}}}'
                f' / em_inf:requests:rate5m{{sli!="first_token", {RECORDED}}}'
            },
        ),
        (
            "Budget burn",
            "none",
            "How many times faster than allowed the budget is spent. Above 14.4 for an hour somebody is called.",
            {
                "1 h: {{sli}} {{job}} {{model}}": f"em_inf:budget_burn:1h{{{RECORDED}}}",
                "3 d: {{sli}} {{job}} {{model}}": f"em_inf:budget_burn:3d{{{RECORDED}}}",
            },
        ),
        (
            "Servers",
            "short",
            "Scrape targets, and those that answer.",
            {
                "{{job}}: targets": f"count by (namespace, job) (up{{{SERVERS}}})",
                "{{job}}: up": f"sum by (namespace, job) (up{{{SERVERS}}})",
            },
        ),
        (
            "HTTP responses",
            "reqps",
            "On POST under /v1, by status, of all models. A stream that breaks has the 2xx that it began with.",
            {
                "{{status}}": f'sum by (status) (rate(http_requests_total{{{SERVERS}, method="POST", '
                f'handler=~"/v1/.*"}}{RATE}))'
            },
        ),
    ],
    "Throughput": [
        (
            "Tokens",
            "suffix:tokens/s",
            "Over all replicas. Prompt tokens that the prefix cache had are among them.",
            {
                "generated {{model_name}}": rate("vllm:generation_tokens_total", VLLM, "model_name"),
                "prompts {{model_name}}": rate("vllm:prompt_tokens_total", VLLM, "model_name"),
            },
        ),
        (
            "Requests by outcome",
            "reqps",
            "Engine requests by the reason of their end (vLLM), and HTTP requests with a method by how they ended.",
            {
                "vLLM: {{finished_reason}}": rate("vllm:request_success_total", VLLM, "finished_reason"),
                "{{method}}: {{outcome}}": rate("em_inf_requests_total", OURS, "method, outcome"),
            },
        ),
        (
            "Running",
            "short",
            "Requests in the engines' batches. A strategy's branches are requests of their own.",
            {"{{model_name}}": f"sum by (model_name) (vllm:num_requests_running{{{VLLM}}})"},
        ),
    ],
    "Queue and cache": [
        (
            "Waiting",
            "short",
            "Requests that no engine has begun, or that were preempted.",
            {"{{model_name}}": f"sum by (model_name) (vllm:num_requests_waiting{{{VLLM}}})"},
        ),
        (
            "Queue",
            "s",
            "How long the queue takes at the rate at which requests end, and how long those that ended have waited.",
            {"to empty it: {{model_name}}": f"em_inf:queue:seconds{{{VLLM}}}"}
            | quantiles("vllm:request_queue_time_seconds", VLLM, "model_name", "waited: {{model_name}}", 0.95),
        ),
        (
            "KV cache in use",
            "percentunit",
            "Mean and maximum over the engines. Blocks that only the prefix cache holds do not count.",
            {
                "mean {{model_name}}": f"avg by (model_name) (vllm:kv_cache_usage_perc{{{VLLM}}})",
                "max {{model_name}}": f"max by (model_name) (vllm:kv_cache_usage_perc{{{VLLM}}})",
            },
        ),
        (
            "Preemptions",
            "reqps",
            "Requests that lost their place in the cache and have to be computed again.",
            {"{{model_name}}": rate("vllm:num_preemptions_total", VLLM, "model_name")},
        ),
        (
            "Prefix cache",
            "percentunit",
            "Share of the tokens looked up that were found. A strategy's branches find their prompt.",
            {
                "{{model_name}}": share(
                    "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", VLLM, "model_name"
                )
            },
        ),
    ],
    "Entropy": [
        (
            "Mean entropy",
            "suffix:nats",
            "Of a token's distribution, as the model gave it and as the method left it.",
            {
                "before {{model}} {{method}}": mean("em_inf_entropy_before_nats", OURS, "model, method"),
                "after {{model}} {{method}}": mean("em_inf_entropy_after_nats", OURS, "model, method"),
            },
        ),
        (
            "Entropy before: quantiles",
            "suffix:nats",
            "Most tokens are certain; the upper quantiles are those that the method works on.",
            quantiles("em_inf_entropy_before_nats", OURS, "model, method", "{{model}} {{method}}", 0.5, 0.9, 0.99),
        ),
        (
            "Entropy after: quantiles",
            "suffix:nats",
            "To be compared with the panel before.",
            quantiles("em_inf_entropy_after_nats", OURS, "model, method", "{{model}} {{method}}", 0.5, 0.9, 0.99),
        ),
        (
            "Reduction",
            "suffix:nats",
            "By how much the method lowered a token's entropy, on average over all tokens, changed or not.",
            {"{{model}} {{method}}": mean("em_inf_entropy_reduction_nats", OURS, "model, method")},
        ),
        (
            "Optimised tokens",
            "percentunit",
            "Share of the tokens whose distribution was changed.",
            {
                "{{model}} {{method}}": share(
                    "em_inf_optimized_tokens_total", "em_inf_tokens_total", OURS, "model, method"
                )
            },
        ),
        (
            "Steps",
            "none",
            "Gradient steps for each token that was changed. Near the requests' limit, the limit is what ends them.",
            {
                "{{model}} {{method}}": share(
                    "em_inf_steps_total", "em_inf_optimized_tokens_total", OURS, "model, method"
                )
            },
        ),
        (
            "Tokens without statistics",
            "percentunit",
            "Of all tokens: came too late, were given up in the worker, or had logits that are NaN or infinite.",
            {
                "missing {{model}}": share("em_inf_missing_tokens_total", "em_inf_tokens_total", OURS, "model"),
                "dropped {{model}}": share("em_inf_records_dropped_total", "em_inf_tokens_total", OURS, "model"),
                "not finite {{model}}": share(
                    "em_inf_passed_through_tokens_total", "em_inf_tokens_total", OURS, "model"
                ),
            },
        ),
        (
            "Time in the transform",
            "percentunit",
            "Share of an engine's time, idle or not, over all engines.",
            {"{{model}}": f"em_inf:transform:share5m{{{OURS}}}"},
        ),
        (
            "Requests observed",
            "short",
            "Requests whose statistics are being collected. It follows those in the engines; what stays is a leak.",
            {"{{model}}": f"sum by (model) (em_inf_tracked_requests{{{OURS}}})"},
        ),
    ],
    "Strategies": [
        (
            "Branches",
            "reqps",
            "Engine requests that strategies made, by how they ended.",
            {
                f"{state} {{{{strategy}}}}": rate(f"em_inf_strategy_branches_{state}_total", OURS, "strategy")
                for state in ("started", "completed", "cancelled", "failed")
            },
        ),
        (
            "Branches running",
            "short",
            "In the engines now.",
            {"{{strategy}}": f"sum by (strategy) (em_inf_strategy_branches_running{{{OURS}}})"},
        ),
        (
            "Agreement",
            "percentunit",
            "Share of the votes that the winning answer had: the mean, and the worst tenth of the requests.",
            {"mean {{model}} {{strategy}}": mean("em_inf_strategy_agreement", OURS, "model, strategy")}
            | quantiles("em_inf_strategy_agreement", OURS, "model, strategy", "{{model}} {{strategy}}", 0.1),
        ),
        (
            "Tokens saved",
            "suffix:tokens/s",
            "By branches that were ended early. An estimate.",
            {"{{strategy}}": rate("em_inf_strategy_tokens_saved_total", OURS, "strategy")},
        ),
    ],
}


def panel(number: int, place: dict[str, int], about: Panel) -> dict[str, Any]:
    """A panel of Grafana's."""
    title, unit, description, queries = about
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": unit, "min": 0, "custom": {"showPoints": "never"}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
            for i, (legend, expr) in enumerate(queries.items())
        ],
    }


def panels() -> list[dict[str, Any]]:
    """Rows one below the other, their panels side by side."""
    made: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": y, "w": ACROSS, "h": 1}
        made.append(
            {"id": len(made) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        )
        y += 1
        for first in range(0, len(row), ACROSS // WIDTH):
            for column, about in enumerate(row[first : first + ACROSS // WIDTH]):
                place = {"x": WIDTH * column, "y": y, "w": WIDTH, "h": HEIGHT}
                made.append(panel(len(made) + 1, place, about))
            y += HEIGHT
    return made


def choice(name: str, values: str) -> dict[str, Any]:
    """A variable with the values of a label; "All" is any value, and none: compose sets no namespace."""
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": values, "refId": name},
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def dashboard() -> dict[str, Any]:
    """All of it."""
    source = {"name": "datasource", "label": "datasource", "type": "datasource", "query": "prometheus", "current": {}}
    model = choice("model", 'label_values(vllm:num_requests_running{namespace=~"$namespace"}, model_name)')
    namespace = choice("namespace", "label_values(vllm:num_requests_running, namespace)")
    return {
        "uid": "em-inf-server",
        "title": "em-inf-server",
        "description": "Objectives, throughput, queue and cache, entropy, strategies. Needs what rules.yaml records.",
        "tags": ["em-inf", "vllm"],
        "schemaVersion": 39,  # Grafana 10.4's; newer ones bring it up to date themselves
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [source, namespace, model]},
        "annotations": {"list": []},
        "panels": panels(),
    }


if __name__ == "__main__":
    text = json.dumps(dashboard(), indent=1) + "\n"
    if sys.argv[1:] == ["-"]:  # to look at
        sys.stdout.write(text)
    else:
        Path(__file__).with_suffix(".json").write_text(text)
