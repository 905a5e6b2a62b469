"""The Prometheus metrics of strategies, `em_inf_strategy_*`. Documented in docs/metrics.md, line for line."""

from collections.abc import Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

HELP = {
    "branches_started": "Branches started: the engine requests that strategies made.",
    "branches_completed": "Branches that ran to their end: a stop, or the token limit.",
    "branches_cancelled": "Branches ended earlier: by early stop, by the strategy for their low confidence, or because "
    "the client went away.",
    "branches_failed": "Branches that the engine failed.",
    "branches_running": "Branches in the engine now.",
    "agreement": "Share of the (weighted) votes for the winning answer, for each request whose strategy votes.",
    "tokens_saved": "Estimate of the tokens not generated because branches were cancelled or never started: each "
    "counts by how much shorter it was than the mean of the request's completed branches.",
}
AGREEMENT_BUCKETS = tuple(share / 10 for share in range(1, 11))


class StrategyMetrics:
    """The strategies' metrics for one model."""

    def __init__(self, model: str, strategies: Sequence[str], registry: CollectorRegistry = REGISTRY) -> None:
        self.model = model
        labels = ("model", "strategy")

        def counter(name: str) -> Counter:
            return Counter(f"em_inf_strategy_{name}", HELP[name], labels, registry=registry)

        self.counters = {name: counter(name) for name in HELP if name not in ("branches_running", "agreement")}
        self.running = Gauge(
            "em_inf_strategy_branches_running",
            HELP["branches_running"],
            labels,
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.agreement = Histogram(
            "em_inf_strategy_agreement",
            HELP["agreement"],
            labels,
            registry=registry,
            buckets=AGREEMENT_BUCKETS,
        )
        for strategy in strategies:
            for metric in (*self.counters.values(), self.running, self.agreement):
                metric.labels(model, strategy)

    def observe_start(self, strategy: str) -> None:
        """Count a branch that went to the engine."""
        self.counters["branches_started"].labels(self.model, strategy).inc()
        self.running.labels(self.model, strategy).inc()

    def observe_end(self, strategy: str, state: str) -> None:
        """Count the end of a branch: completed, cancelled or failed."""
        self.counters[f"branches_{state}"].labels(self.model, strategy).inc()
        self.running.labels(self.model, strategy).dec()

    def observe_result(self, strategy: str, agreement: float | None, tokens_saved: float) -> None:
        """Record the result of a request; `agreement` is None if its strategy does not vote."""
        self.counters["tokens_saved"].labels(self.model, strategy).inc(tokens_saved)
        if agreement is not None:
            self.agreement.labels(self.model, strategy).observe(agreement)
