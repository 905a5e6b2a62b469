"""Faults of vLLM that would end the start with tracebacks, or the engine by one request: prevented, each with one line.

What is prevented, and how it was seen: docs/findings/upstream.md.
"""

import logging
import os
import shutil
from argparse import Namespace
from typing import Any

from vllm.platforms import current_platform

from server import cpu_defaults
from server.model_files import StartError, read_model

logger = logging.getLogger("vllm.em_inf")

SEVERAL_SHUTDOWN_S = 5  # seconds; above server/drain.py's LAST_WORD_S, with time for the engine client
SHARED_MEMORY = "/dev/shm"  # where vLLM's processes exchange messages
SHARED_MEMORY_PER_ENGINE = 160 * 2**20  # bytes; measured: docs/findings/upstream.md


def prepare(args: Namespace) -> None:
    """Change `args` and the environment so that no fault is met that can be avoided.

    Raises:
        StartError: if one would be met all the same.
    """
    args.root_path = (args.root_path or "").rstrip("/")  # "/" switches vLLM's own check of the key off
    _leave_time_to_cut_off(args)
    _check_shared_memory(args)
    model = read_model(args.model_tag or args.model, args.revision, args.hf_token)
    if current_platform.is_cpu():
        _refuse_pipelines(args)
        cpu_defaults.choose(args, model)
        _avoid_compiler()


def limit_engine(vllm_config: Any) -> None:
    """Lower what requests may ask for to what the engine survives; called in each API server, before it serves."""
    model = vllm_config.model_config
    if model.max_logprobs > model.get_vocab_size():
        logger.warning("--max-logprobs %d is lowered to the vocabulary, %d", model.max_logprobs, model.get_vocab_size())
        model.max_logprobs = model.get_vocab_size()
    if seeds_end_engine(vllm_config):
        logger.warning(
            "Requests with a seed are refused: with chunked prefill they would end vLLM's V1 runner on the CPU. "
            "Serve with --no-enable-chunked-prefill to accept them"
        )


def seeds_end_engine(vllm_config: Any) -> bool:
    """Return whether a request with a seed that is prefilled in chunks ends the engine: generators lack an offset."""
    chunks = vllm_config.scheduler_config.enable_chunked_prefill
    return bool(current_platform.is_cpu() and chunks and not vllm_config.use_v2_model_runner)


def _leave_time_to_cut_off(args: Namespace) -> None:
    """Raise --shutdown-timeout for several API servers: vLLM kills them when it is over, also if it is 0."""
    if (args.api_server_count or args.data_parallel_size) > 1:
        args.shutdown_timeout = max(args.shutdown_timeout, SEVERAL_SHUTDOWN_S)


def _avoid_compiler() -> None:
    """Turn compilation off on a machine without a C++ compiler; --enforce-eager leaves code for logprobs to compile."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
        logger.info("Nothing is compiled: there is no %s on this machine", compiler)


def _refuse_pipelines(args: Namespace) -> None:
    if args.pipeline_parallel_size > 1:
        raise StartError("--pipeline-parallel-size: must be 1 on the CPU, where the first request would end the engine")


def _check_shared_memory(args: Namespace) -> None:
    if not os.path.isdir(SHARED_MEMORY):
        return
    engines = args.data_parallel_size_local or args.data_parallel_size or 1
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, engines * SHARED_MEMORY_PER_ENGINE
    if free < needed:
        raise StartError(
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free; must be at least {needed / 2**20:.0f} MiB "
            "(in a container: --shm-size 1g)"
        )
