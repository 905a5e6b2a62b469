"""What the plain command needs on a CPU to start, and to answer in time: chosen if the user has not, a line for each.

Measured: docs/findings/real-models.md.
"""

import logging
import os
from argparse import Namespace
from pathlib import Path

from vllm.engine.arg_utils import EngineArgs
from vllm.utils.cpu_resource_utils import MemoryNodeInfo, get_allowed_cpu_list, get_memory_node_info

from server.model_files import ModelFiles, StartError

logger = logging.getLogger("vllm.em_inf")

GIB = 2**30
CONTEXT = 4096  # tokens. Without chunks the start takes one step of the whole context: with 32,768 over half an hour.
MOST_KV_CACHE, LEAST_KV_CACHE = 4 * GIB, GIB // 2  # bytes, if less memory is free than vLLM would take
SMALL = 100 * 2**20  # bytes of weights, below which any type is fast
PROCESSOR = Path("/proc/cpuinfo")


def choose(args: Namespace, model: ModelFiles) -> None:
    """Change `args` in place.

    Raises:
        StartError: if too little memory is free.
    """
    _avoid_chunks(args, model)
    _fit_memory(args, _choose_type(args, model))


def _avoid_chunks(args: Namespace, model: ModelFiles) -> None:
    """Turn chunked prefill off for the V1 runner, unless the user has chosen it, or a step that may need it.

    vLLM then lets a step have as many tokens as the context, and begins with one: so a long context is limited.
    """
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") == "1":
        return
    if args.enable_chunked_prefill is not None or args.max_num_batched_tokens is not None:
        return
    args.enable_chunked_prefill = False
    logger.info("Chunked prefill is off: on the CPU, vLLM's V1 runner cannot combine it with seeds")
    if args.max_model_len is None and (model.context or 0) > CONTEXT:
        args.max_model_len = CONTEXT
        logger.info(
            "The context is limited to %d tokens of the model's %d, since the start takes one step of the whole "
            "context; --max-model-len changes it",
            *(CONTEXT, model.context),
        )


def _choose_type(args: Namespace, model: ModelFiles) -> int:
    """Choose float32 for weights in bfloat16 if the processor has no instructions for these and the memory suffices.

    Return the bytes that a worker's weights will take; 0 if that is unknown.
    """
    weights = (model.weights or 0) // int(args.tensor_parallel_size)
    if args.dtype != "auto" or model.dtype != "bfloat16" or weights < SMALL or _multiplies_bfloat16():
        return weights
    if 2 * weights + LEAST_KV_CACHE > _memory().available_memory:
        return weights
    args.dtype = "float32"
    logger.info(
        "The weights are float32: without AVX-512 this processor is several times slower with the model's bfloat16, "
        "which takes half the memory; --dtype bfloat16 chooses it"
    )
    return 2 * weights


def _multiplies_bfloat16() -> bool:
    """Return whether the library that multiplies matrices for torch has kernels for bfloat16 on this processor.

    On x86 it has them from AVX-512 up; of other processors we know nothing, and leave the choice to vLLM.
    """
    try:
        flags = PROCESSOR.read_text().split()
    except OSError:
        return True
    return "avx2" not in flags or "avx512f" in flags


def _fit_memory(args: Namespace, weights: int) -> None:
    """Give the KV cache what is left if vLLM would take more than is free and the user has not said how much.

    vLLM checks the same in its worker, by the memory of the first node that this process may use, and ends with a
    traceback.
    """
    free = _memory().available_memory
    if weights > free:
        raise StartError(
            f"model: its weights take {weights / GIB:.1f} GiB, and {free / GIB:.1f} GiB of memory are free"
        )
    if args.kv_cache_memory_bytes is not None or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return
    wanted = _memory().total_memory * args.gpu_memory_utilization
    if wanted <= free:
        return
    cache = min(MOST_KV_CACHE, (free - weights) // 2)
    if args.gpu_memory_utilization != EngineArgs.gpu_memory_utilization or cache < LEAST_KV_CACHE:
        raise StartError(
            f"{free / GIB:.1f} GiB of memory are free, and vLLM would take {wanted / GIB:.1f} GiB "
            f"(--gpu-memory-utilization {args.gpu_memory_utilization}): lower it, or set VLLM_CPU_KVCACHE_SPACE to the "
            "GiB that the KV cache may have"
        )
    args.kv_cache_memory_bytes = cache
    logger.info(
        "The KV cache has %.1f GiB: %.1f GiB of memory are free, less than the %.1f GiB that vLLM would take; "
        "--kv-cache-memory-bytes changes it",
        *(cache / GIB, free / GIB, wanted / GIB),
    )


def _memory() -> MemoryNodeInfo:
    """Return the bytes, all and free, of the first memory node that this process may use."""
    return get_memory_node_info(get_allowed_cpu_list()[0].numa_node)
