"""Entropy-minimising transforms of next-token logits (EM-INF, adaptive temperature) and their place in vLLM.

Importable without vLLM.
"""

from em_sampler.params import AdaptiveTemperatureParams, EMInfParams, ParamsError
from em_sampler.rows import Transformed
from em_sampler.torch_batched import transform

__all__ = ["AdaptiveTemperatureParams", "EMInfParams", "ParamsError", "Transformed", "transform"]
