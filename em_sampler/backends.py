"""Which implementation of the transform runs where, and one loud line where the fast one cannot."""

import logging
from collections.abc import Callable

import torch

from em_sampler.rows import BatchTransform
from em_sampler.torch_batched import BatchedTransform

logger = logging.getLogger(__name__)


def fastest_transform(vocab_size: int, device: torch.device, max_rows: int) -> BatchTransform:
    """The fastest implementation for `device`, its memory allocated and its code compiled.

    Args:
        vocab_size: logits per row.
        max_rows: the most rows of one call.
    """
    make = _ON.get(device.type)
    if make is None:
        return BatchedTransform(vocab_size, device, max_rows)
    try:
        return make(vocab_size, device, max_rows)
    except Exception as error:  # whatever a compiler may raise: a slow engine is better than none
        logger.warning(
            "em_inf: the fast transform does not work here (%s: %s). Every token goes through the slow one.",
            type(error).__name__,
            error,
        )
        return BatchedTransform(vocab_size, device, max_rows)


def _counted(vocab_size: int, device: torch.device, max_rows: int) -> BatchTransform:
    from em_sampler.cpu_counted import CountedTransform

    return CountedTransform(vocab_size)


def _fused(vocab_size: int, device: torch.device, max_rows: int) -> BatchTransform:
    from em_sampler.triton_fused import FusedTransform

    return FusedTransform(vocab_size, device, max_rows)


_ON: dict[str, Callable[[int, torch.device, int], BatchTransform]] = {"cpu": _counted, "cuda": _fused}
