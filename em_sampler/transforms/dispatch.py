"""Which implementation of the transform runs where, and one loud line where the fast one cannot."""

import logging
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from em_sampler.params import Params
from em_sampler.transforms.batch import BatchParams, Transform, TransformOutput, check_batch
from em_sampler.transforms.eager import EagerTransform

logger = logging.getLogger(__name__)


def build_transform(vocab_size: int, device: torch.device, max_rows: int) -> Transform:
    """The fastest implementation for `device`, its memory allocated and its code compiled.

    Args:
        vocab_size: logits per row.
        max_rows: the most rows of one call.
    """
    make = _ON.get(device.type)
    if make is None:
        return EagerTransform(vocab_size, device, max_rows)
    try:
        return make(vocab_size, device, max_rows)
    except Exception as error:  # whatever a compiler may raise: a slow engine is better than none
        logger.warning(
            "em_inf: the fast transform does not work here (%s: %s). Every token goes through the slow one.",
            type(error).__name__,
            error,
        )
        return EagerTransform(vocab_size, device, max_rows)


def _counted(vocab_size: int, device: torch.device, max_rows: int) -> Transform:
    from em_sampler.transforms.numba_cpu import NumbaTransform

    return NumbaTransform(vocab_size)


def _fused(vocab_size: int, device: torch.device, max_rows: int) -> Transform:
    from em_sampler.transforms.triton_cuda import TritonTransform

    return TritonTransform(vocab_size, device, max_rows)


_ON: dict[str, Callable[[int, torch.device, int], Transform]] = {"cpu": _counted, "cuda": _fused}


class ReusableTransform:
    """The fastest implementation for the logits at hand, kept for the next call and rebuilt when these outgrow it.

    Safe to share between threads: calls take turns.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transform: Transform | None = None
        self._fits: tuple[torch.device, int] | None = None  # device and vocabulary that it was built for
        self._max_rows = 0

    def __call__(self, logits: Tensor, params: Sequence[Params | None]) -> TransformOutput:
        """Transform `logits` [rows, vocab] float32 in place, row i by `params[i]`."""
        rows, vocab = logits.shape
        with self._lock:
            if self._transform is None or rows > self._max_rows or (logits.device, vocab) != self._fits:
                self._transform = build_transform(vocab, logits.device, rows)
                self._fits, self._max_rows = (logits.device, vocab), rows
            output = self._transform(logits, BatchParams.of(params, logits.device))
            return output._replace(statistics=output.statistics.clone())  # the next call overwrites it


_shared = ReusableTransform()


def transform(logits: Tensor, params: Sequence[Params | None]) -> TransformOutput:
    """Apply each row's method to `logits`, in place, with the fastest implementation for their device.

    Args:
        logits: [rows, vocab] float32, on any device. -inf (a forbidden token) stays -inf.
        params: one entry per row; None leaves its row untouched.

    Raises:
        ValueError: if shape, dtype or the number of parameters do not fit.

    Source: arXiv 2505.15134, section 4 and appendix A. `em_sampler.transforms.reference` is the float64 reference,
    `em_sampler.transforms.eager.transform` the same in plain torch.
    """
    check_batch(logits, params)
    return _shared(logits, params)
