"""Entropy-minimising transforms of next-token logits (EM-INF, adaptive temperature) and their place in vLLM.

Needs neither vLLM nor, until a transform is used, torch.
"""

from typing import TYPE_CHECKING, Any

from em_sampler.params import AdaptiveTemperatureParams, EMInfParams, MeasureParams
from em_sampler.validation import ParamsError

if TYPE_CHECKING:
    from em_sampler.transforms.batch import TransformOutput
    from em_sampler.transforms.dispatch import transform

__all__ = ["AdaptiveTemperatureParams", "EMInfParams", "MeasureParams", "ParamsError", "TransformOutput", "transform"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used."""
    if name == "transform":
        from em_sampler.transforms.dispatch import transform

        return transform
    if name == "TransformOutput":
        from em_sampler.transforms.batch import TransformOutput

        return TransformOutput
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
