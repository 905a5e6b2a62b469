"""Generator of dashboard.json, for Grafana 10 or newer: `python deploy/monitoring/dashboard.py`.

Edit ROWS here, never the JSON. Both are in git: kustomize and compose read the JSON, and neither can run a generator.
"""

import json
import sys
from pathlib import Path
from typing import Any

PANEL_WIDTH, PANEL_HEIGHT, PAGE_WIDTH = 8, 8, 24  # in the units of Grafana's grid
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SERVERS = 'namespace=~"$namespace", job=~".*em-inf-server.*"'  # metrics without a model, which other servers export too
VLLM = 'namespace=~"$namespace", model_name=~"$model"'
OURS = 'namespace=~"$namespace", model=~"$model"'
RECORDED = 'namespace=~"$namespace", model=~"$model|"'  # some series that rules.yaml records have no model
RATE_RANGE = "[$__rate_interval]"

Panel = tuple[str, str, str, dict[str, str]]  # title, unit, description, legend -> PromQL


def rate(metric: str, labels: str, by: str) -> str:
    """Return the query for a counter's increase per second, summed over all replicas."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}{RATE_RANGE}))"


def ratio(part: str, total: str, labels: str, by: str) -> str:
    """Return the query for one counter's rate divided by another's."""
    return f"{rate(part, labels, by)} / {rate(total, labels, by)}"


def mean(histogram: str, labels: str, by: str) -> str:
    """Return the query for the mean of a histogram's observations."""
    return ratio(f"{histogram}_sum", f"{histogram}_count", labels, by)


def quantiles(histogram: str, labels: str, by: str, legend: str, *levels: float) -> dict[str, str]:
    """Return one query per quantile level (between 0 and 1), by legend."""
    buckets = rate(f"{histogram}_bucket", labels, f"le, {by}")
    return {f"p{100 * level:g} {legend}": f"histogram_quantile({level}, {buckets})" for level in levels}


ROWS: dict[str, list[Panel]] = {
    "Objectives": [
        (
            "Time to first token",
            "s",
            "From a request's arrival, including its time in the queue. Objective: 95 % within 2.5 s.",
            quantiles("vllm:time_to_first_token_seconds", VLLM, "model_name", "{{model_name}}", 0.5, 0.95, 0.99),
        ),
        (
            "Time between tokens",
            "s",
            "Between consecutive tokens, and the mean over one complete response.",
            quantiles("vllm:inter_token_latency_seconds", VLLM, "model_name", "{{model_name}}", 0.5, 0.95, 0.99)
            | quantiles(
                "vllm:request_time_per_output_token_seconds", VLLM, "model_name", "{{model_name}}, per response", 0.95
            ),
        ),
        (
            "Failed requests",
            "percentunit",
            "http: 5xx, all models. em_inf: requests with a method, including broken streams. Objective: below 0.5 %.",
            {
                "{{sli}} {{job}} {{model}}": f'em_inf:requests_bad:rate5m{{sli!="first_token", {RECORDED}}}'
                f' / em_inf:requests:rate5m{{sli!="first_token", {RECORDED}}}'
            },
        ),
        (
            "Budget burn",
            "none",
            "How many times faster than allowed the error budget is spent. Above 14.4 for 1 h is critical.",
            {
                "1 h: {{sli}} {{job}} {{model}}": f"em_inf:budget_burn:1h{{{RECORDED}}}",
                "3 d: {{sli}} {{job}} {{model}}": f"em_inf:budget_burn:3d{{{RECORDED}}}",
            },
        ),
        (
            "Servers",
            "short",
            "Scrape targets, and those of them that are up.",
            {
                "{{job}}: targets": f"count by (namespace, job) (up{{{SERVERS}}})",
                "{{job}}: up": f"sum by (namespace, job) (up{{{SERVERS}}})",
            },
        ),
        (
            "HTTP responses",
            "reqps",
            "POST under /v1, by status, all models. A stream that breaks counts with the 2xx that it started with.",
            {
                "{{status}}": f'sum by (status) (rate(http_requests_total{{{SERVERS}, method="POST", '
                f'handler=~"/v1/.*"}}{RATE_RANGE}))'
            },
        ),
    ],
    "Throughput": [
        (
            "Tokens",
            "suffix:tokens/s",
            "Over all replicas. Prompt tokens include those found in the prefix cache.",
            {
                "generated {{model_name}}": rate("vllm:generation_tokens_total", VLLM, "model_name"),
                "prompts {{model_name}}": rate("vllm:prompt_tokens_total", VLLM, "model_name"),
            },
        ),
        (
            "Requests by outcome",
            "reqps",
            "Engine requests by finish reason (vLLM), and HTTP requests with a method by outcome.",
            {
                "vLLM: {{finished_reason}}": rate("vllm:request_success_total", VLLM, "finished_reason"),
                "{{method}}: {{outcome}}": rate("em_inf_requests_total", OURS, "method, outcome"),
            },
        ),
        (
            "Running",
            "short",
            "Engine requests in the batches. Each branch of a strategy is one.",
            {"{{model_name}}": f"sum by (model_name) (vllm:num_requests_running{{{VLLM}}})"},
        ),
    ],
    "Queue and cache": [
        (
            "Waiting",
            "short",
            "Engine requests that were not started yet, or were preempted.",
            {"{{model_name}}": f"sum by (model_name) (vllm:num_requests_waiting{{{VLLM}}})"},
        ),
        (
            "Queue",
            "s",
            "Time to empty the queue at the rate at which requests finish, and the waiting time of finished requests.",
            {"to empty: {{model_name}}": f"em_inf:queue:seconds{{{VLLM}}}"}
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
            "Requests that lost their KV cache and are computed again from the start.",
            {"{{model_name}}": rate("vllm:num_preemptions_total", VLLM, "model_name")},
        ),
        (
            "Prefix cache",
            "percentunit",
            "Share of the looked-up tokens that were found. The branches of a strategy find their prompt.",
            {
                "{{model_name}}": ratio(
                    "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", VLLM, "model_name"
                )
            },
        ),
    ],
    "Entropy": [
        (
            "Mean entropy",
            "suffix:nats",
            "Entropy of a token's distribution before and after the method.",
            {
                "before {{model}} {{method}}": mean("em_inf_entropy_before_nats", OURS, "model, method"),
                "after {{model}} {{method}}": mean("em_inf_entropy_after_nats", OURS, "model, method"),
            },
        ),
        (
            "Entropy before: quantiles",
            "suffix:nats",
            "Most tokens have low entropy; the method changes those in the upper quantiles.",
            quantiles("em_inf_entropy_before_nats", OURS, "model, method", "{{model}} {{method}}", 0.5, 0.9, 0.99),
        ),
        (
            "Entropy after: quantiles",
            "suffix:nats",
            "Compare with the panel before.",
            quantiles("em_inf_entropy_after_nats", OURS, "model, method", "{{model}} {{method}}", 0.5, 0.9, 0.99),
        ),
        (
            "Reduction",
            "suffix:nats",
            "Mean reduction of a token's entropy, over all tokens, changed or not.",
            {"{{model}} {{method}}": mean("em_inf_entropy_reduction_nats", OURS, "model, method")},
        ),
        (
            "Optimised tokens",
            "percentunit",
            "Share of the tokens whose distribution was changed.",
            {
                "{{model}} {{method}}": ratio(
                    "em_inf_optimized_tokens_total", "em_inf_tokens_total", OURS, "model, method"
                )
            },
        ),
        (
            "Steps",
            "none",
            "Gradient steps per changed token. Near the requests' max_steps, that limit ends the optimisation.",
            {
                "{{model}} {{method}}": ratio(
                    "em_inf_steps_total", "em_inf_optimized_tokens_total", OURS, "model, method"
                )
            },
        ),
        (
            "Tokens without stats",
            "percentunit",
            "Shares of all tokens: stats missing, stats dropped in the worker, logits NaN or infinite.",
            {
                "missing {{model}}": ratio("em_inf_missing_tokens_total", "em_inf_tokens_total", OURS, "model"),
                "dropped {{model}}": ratio("em_inf_records_dropped_total", "em_inf_tokens_total", OURS, "model"),
                "not finite {{model}}": ratio(
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
            "Tracked requests",
            "short",
            "Requests whose stats are being collected. Follows the engines' requests; a lasting excess is a leak.",
            {"{{model}}": f"sum by (model) (em_inf_tracked_requests{{{OURS}}})"},
        ),
    ],
    "Strategies": [
        (
            "Branches",
            "reqps",
            "Engine requests that strategies started, by outcome.",
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
            "Share of the votes for the winning answer: mean, and 10th percentile of the requests.",
            {"mean {{model}} {{strategy}}": mean("em_inf_strategy_agreement", OURS, "model, strategy")}
            | quantiles("em_inf_strategy_agreement", OURS, "model, strategy", "{{model}} {{strategy}}", 0.1),
        ),
        (
            "Tokens saved",
            "suffix:tokens/s",
            "Estimate of the tokens that cancelled and never-started branches would have cost.",
            {"{{strategy}}": rate("em_inf_strategy_tokens_saved_total", OURS, "strategy")},
        ),
    ],
}


def panel(panel_id: int, position: dict[str, int], content: Panel) -> dict[str, Any]:
    """Return a Grafana time series panel."""
    title, unit, description, queries = content
    return {
        "id": panel_id,
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": position,
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
    """Return the rows and their panels, laid out left to right, top to bottom."""
    made: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        position = {"x": 0, "y": y, "w": PAGE_WIDTH, "h": 1}
        made.append(
            {"id": len(made) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": position, "panels": []}
        )
        y += 1
        for first in range(0, len(row), PAGE_WIDTH // PANEL_WIDTH):
            for column, content in enumerate(row[first : first + PAGE_WIDTH // PANEL_WIDTH]):
                position = {"x": PANEL_WIDTH * column, "y": y, "w": PANEL_WIDTH, "h": PANEL_HEIGHT}
                made.append(panel(len(made) + 1, position, content))
            y += PANEL_HEIGHT
    return made


def variable(name: str, values: str) -> dict[str, Any]:
    """Return a variable over a label's values. "All" also matches no label: compose sets no namespace."""
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
    """Return the complete dashboard."""
    source = {"name": "datasource", "label": "datasource", "type": "datasource", "query": "prometheus", "current": {}}
    model = variable("model", 'label_values(vllm:num_requests_running{namespace=~"$namespace"}, model_name)')
    namespace = variable("namespace", "label_values(vllm:num_requests_running, namespace)")
    return {
        "uid": "em-inf-server",
        "title": "em-inf-server",
        "description": "Objectives, throughput, queue and cache, entropy, strategies. Needs the rules of rules.yaml.",
        "tags": ["em-inf", "vllm"],
        "schemaVersion": 39,  # that of Grafana 10.4; newer versions migrate it on load
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
    if sys.argv[1:] == ["-"]:  # print, for the test
        sys.stdout.write(text)
    else:
        Path(__file__).with_suffix(".json").write_text(text)
