"""Builds a worker's transform as the operator asked for it, and says which one it is: in the log and to API servers."""

import logging
import os

import torch
from vllm.config import ParallelConfig
from vllm.v1.worker.worker_base import WorkerBase

from em_sampler.transforms import dispatch
from em_sampler.transforms.batch import Transform
from em_sampler.transforms.eager import EagerTransform

logger = logging.getLogger("vllm.em_inf")  # vLLM's own handler prints it; nothing prints INFO of other loggers

REQUIRE_FUSED_ENV = "EM_INF_REQUIRE_FUSED"  # "1": set by em-serve for its workers
# The method of a worker that vLLM's `collective_rpc` calls. It answers {"transform": its name, "device": its type}, or
# None on a pipeline stage that does not sample.
TRANSFORM_RPC = "em_inf_transform"


def build_transform(parallel_config: ParallelConfig, vocab_size: int, device: torch.device, max_rows: int) -> Transform:
    """Build the transform; other arguments and errors are those of `dispatch.build_transform`."""
    stages, rank = parallel_config.pipeline_parallel_size, parallel_config.rank
    if rank < parallel_config.world_size // stages * (stages - 1):
        # vLLM builds a processor on every stage and calls that of the last: no memory and no compilation elsewhere.
        setattr(WorkerBase, TRANSFORM_RPC, lambda worker: None)
        return EagerTransform(1, device, 1)
    require_fused = os.environ.get(REQUIRE_FUSED_ENV) == "1"
    transform = dispatch.build_transform(vocab_size, device, max_rows, require_fused=require_fused)
    logger.info("em_inf: transform %s on %s", transform.name, device)
    setattr(WorkerBase, TRANSFORM_RPC, lambda worker: {"transform": transform.name, "device": device.type})
    return transform
