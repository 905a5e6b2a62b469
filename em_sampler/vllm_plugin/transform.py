"""Builds a worker's transform as the operator asked for it, and logs which one it is."""

import logging
import os

import torch

from em_sampler.transforms import dispatch
from em_sampler.transforms.batch import Transform

logger = logging.getLogger("vllm.em_inf")  # vLLM's own handler prints it; nothing prints INFO of other loggers

REQUIRE_FUSED_ENV = "EM_INF_REQUIRE_FUSED"  # "1": set by em-serve for its workers


def build_transform(vocab_size: int, device: torch.device, max_rows: int) -> Transform:
    """Build the transform; arguments and errors are those of `dispatch.build_transform`."""
    require_fused = os.environ.get(REQUIRE_FUSED_ENV) == "1"
    transform = dispatch.build_transform(vocab_size, device, max_rows, require_fused=require_fused)
    logger.info("em_inf: transform %s on %s", transform.name, device)
    return transform
