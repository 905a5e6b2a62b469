"""What /metrics shows and what docs/metrics.md says, in the same form."""

from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
STRATEGY_PREFIX = "em_inf_strategy_"

Row = tuple[str, ...]  # name, type, labels, help


def series(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """All that /metrics shows, but for times of creation: (name, labels in the order of their names) -> value."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def documented() -> list[Row]:
    """The rows of the page's one table, without code marks."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert set(lines[1]) == set("|-")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return [(*(cell.replace("`", "") for cell in cells[:3]), *cells[3:]) for cells in rows]


def exposed(registry: CollectorRegistry) -> list[Row]:
    """The same of the registry's metrics."""
    rows = []
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        if family.name.endswith("_created"):
            continue
        labels: dict[str, str] = family.samples[0].labels
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert family.type == "histogram" or name in {sample.name for sample in family.samples}
        rows.append((name, family.type, ", ".join(key for key in labels if key != "le"), family.documentation))
    return rows
