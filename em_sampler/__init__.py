"""Transforms of next-token logits by their entropy (EM-INF, adaptive temperature, truncation) and their place in vLLM.

Needs neither vLLM nor, until a transform is used, torch: what needs torch is imported when it is first asked for.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from em_sampler.params import (
    AdaptiveTemperatureParams,
    EMInfParams,
    GreedyBelowParams,
    MeasureParams,
    PLessParams,
    TopHParams,
    TopNSigmaParams,
)
from em_sampler.validation import ParamsError

if TYPE_CHECKING:
    from em_sampler.transforms.batch import TransformOutput
    from em_sampler.transforms.dispatch import transform

__all__ = [
    "AdaptiveTemperatureParams",
    "EMInfParams",
    "GreedyBelowParams",
    "MeasureParams",
    "PLessParams",
    "ParamsError",
    "TopHParams",
    "TopNSigmaParams",
    "TransformOutput",
    "transform",
]

_LAZY = {"TransformOutput": "em_sampler.transforms.batch", "transform": "em_sampler.transforms.dispatch"}


def __getattr__(name: str) -> Any:
    """Import a name of `_LAZY` from its module, or look up the version, which pyproject.toml alone states."""
    if name == "__version__":
        return metadata.version("em-inf-server")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
