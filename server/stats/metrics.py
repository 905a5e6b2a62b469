"""The Prometheus metrics `em_inf_*`, on /metrics beside vLLM's own. Documented in docs/metrics.md, line for line.

They work with one process and with several (prometheus_client's multi-process mode, which vLLM sets up).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from em_sampler.params import METHODS
from em_sampler.stats.wire import ENTROPY_BUCKETS, HISTOGRAMS, REJECTION_REASONS, StructuredArray

HELP = {
    "requests": "HTTP requests that asked for a method (none: measured only), by how they ended: completed, rejected "
    "(4xx), failed (5xx; an error in a stream counts by its code), aborted (the client went away). A request rejected "
    "for its em_inf settings has the method unknown.",
    "tokens": "Tokens of responses whose entropy was measured before they were sampled.",
    "optimized_tokens": "Tokens whose distribution the method changed.",
    "steps": "Gradient steps taken by em_inf; for adaptive_temperature, one for each token that it scaled; none for "
    "methods that remove tokens.",
    "passed_through_tokens": "Tokens left as they were because their logits held NaN or +inf.",
    "missing_tokens": "Tokens whose statistics did not arrive in time; no other metric here counts them.",
    "entropy_before_nats": "Entropy of a token's distribution as the model gave it, at temperature 1.",
    "entropy_after_nats": "Entropy of a token's distribution as the method left it, before the request's temperature.",
    "entropy_max_nats": "The highest entropy of a token in a choice, before the method, at temperature 1.",
    "entropy_reduction_nats": "By how much the method lowered a token's entropy; 0 if it did not.",
    "tracked_requests": "Requests whose statistics are being collected now: those in the engine, and a few just ended.",
    "records_dropped": "Statistics lost on the way from a worker to this server, so that sampling need not wait.",
    "messages_rejected": "Messages at the statistics socket that were not taken in, by reason: malformed, version (a "
    "worker of another version of this project), recipient (for another API server), out_of_range (rows that no worker "
    "can have measured; its other rows were taken in).",
    "transform_info": "1 for each transform that a worker uses: triton_cuda, numba_cpu, or eager, which is many "
    "times slower.",
    "transform_seconds": "Seconds that the workers spent in the transform, measuring included; on a GPU by its clock.",
}
UNKNOWN_METHOD = "unknown"  # the method of a request that is rejected for its settings
OUTCOMES = ("completed", "rejected", "failed", "aborted")


class BulkHistogram(Histogram):
    """A histogram that takes many observations at once, already counted by bucket."""

    def add(self, counts: Any, total: float) -> None:
        """Add `counts` [buckets + 1] observations that sum to `total`."""
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(int(count))
        self._sum.inc(total)


class Metrics:
    """The metrics for one model; those of strategies are in server/strategies/metrics.py."""

    def __init__(
        self, model: str, registry: CollectorRegistry = REGISTRY, transforms: Sequence[Mapping[str, str]] = ()
    ) -> None:
        """Make all series. `transforms`: the workers', as {"transform": name, "device": type}."""
        self.model = model

        def counter(name: str, labels: Sequence[str] = ("model", "method")) -> Counter:
            return Counter(f"em_inf_{name}", HELP[name], labels, registry=registry)

        def histogram(name: str) -> BulkHistogram:
            labels = ("model", "method")
            return BulkHistogram(f"em_inf_{name}", HELP[name], labels, registry=registry, buckets=ENTROPY_BUCKETS)

        def gauge(name: str, labels: Sequence[str], several_servers: Literal["livesum", "livemax"]) -> Gauge:
            return Gauge(f"em_inf_{name}", HELP[name], labels, registry=registry, multiprocess_mode=several_servers)

        self.requests = counter("requests", ("model", "method", "outcome"))
        self.tokens = counter("tokens")
        self.optimized = counter("optimized_tokens")
        self.steps = counter("steps")
        self.passed_through = counter("passed_through_tokens")
        self.missing = counter("missing_tokens")
        self.histograms = {name: histogram(f"entropy_{name}_nats") for name in HISTOGRAMS}
        self.highest = histogram("entropy_max_nats")
        self.tracked = gauge("tracked_requests", ("model",), "livesum")
        info = gauge("transform_info", ("model", "transform", "device"), "livemax")
        for transform in transforms:
            info.labels(model=model, **transform).set(1)
        self.dropped = counter("records_dropped", ("model",))
        self.messages_rejected = counter("messages_rejected", ("model", "reason"))
        self.seconds = counter("transform_seconds", ("model",))
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        """Create every series at the start, so that rates do not miss the first increment."""
        per_method = (self.tokens, self.optimized, self.steps, self.passed_through, self.missing)
        for method in METHODS:
            for metric in (*per_method, *self.histograms.values(), self.highest):
                metric.labels(self.model, method)
            for outcome in OUTCOMES:
                self.requests.labels(self.model, method, outcome)
        self.requests.labels(self.model, UNKNOWN_METHOD, "rejected")
        for reason in REJECTION_REASONS:
            self.messages_rejected.labels(self.model, reason)
        for metric in (self.tracked, self.dropped, self.seconds):
            metric.labels(self.model)

    def observe_request(self, method: str, outcome: str) -> None:
        """Count an HTTP request that has ended with one of OUTCOMES."""
        self.requests.labels(self.model, method, outcome).inc()

    def observe_choice(self, method: str, totals: StructuredArray, missing: int) -> None:
        """Add a choice whose stats are final: its tokens' TOTALS [1], and how many tokens are missing."""
        row = totals[0]
        self.tokens.labels(self.model, method).inc(int(row["tokens"]))
        self.optimized.labels(self.model, method).inc(int(row["optimized"]))
        self.steps.labels(self.model, method).inc(int(row["steps"]))
        self.passed_through.labels(self.model, method).inc(int(row["passed_through"]))
        self.missing.labels(self.model, method).inc(missing)
        for name, histogram in self.histograms.items():
            histogram.labels(self.model, method).add(row[f"{name}_counts"], float(row[f"{name}_sum"]))
        if row["tokens"] > row["passed_through"]:
            self.highest.labels(self.model, method).observe(float(row["highest"]))

    def observe_worker(self, seconds: float, dropped: int) -> None:
        """Add the seconds a worker spent in the transform and the stats it lost, since its last message."""
        self.seconds.labels(self.model).inc(seconds)
        self.dropped.labels(self.model).inc(dropped)

    def observe_rejected(self, reason: str) -> None:
        """Count a message that was rejected for one of REJECTION_REASONS."""
        self.messages_rejected.labels(self.model, reason).inc()
