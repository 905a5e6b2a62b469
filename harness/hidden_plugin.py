"""Hides this project's entry points, so that a vLLM beside it runs as if the package were not installed."""

from importlib import metadata
from typing import Any


def hide_plugin() -> None:
    """Remove our entry points from what `importlib.metadata.entry_points` returns in this process."""
    find = metadata.entry_points

    def without_ours(**selection: Any) -> Any:
        found: Any = find(**selection)
        return metadata.EntryPoints(entry for entry in found if entry.name != "em_inf") if selection else found

    metadata.entry_points = without_ours
