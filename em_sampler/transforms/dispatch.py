"""Chooses the implementation of the transform for a device, and logs one warning if the fast one does not work there.

`build_transform` is for an engine that owns its transform; `transform` is the public function and owns one itself.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from em_sampler.params import Params
from em_sampler.transforms.batch import BatchParams, Transform, TransformOutput, check_batch
from em_sampler.transforms.eager import EagerTransform

logger = logging.getLogger(__name__)

MAX_KEPT = 4  # implementations that `ReusableTransform` keeps; each holds memory


def build_transform(vocab_size: int, device: torch.device, max_rows: int, require_fused: bool = False) -> Transform:
    """Build the fastest implementation for `device`, with its memory allocated and its code compiled.

    Args:
        vocab_size: logits per row.
        device: where the logits are.
        max_rows: the most rows of one call.
        require_fused: raise an error where only the eager form works.

    Raises:
        RuntimeError: if `require_fused` and the device has no fused form, or it does not work here.
    """
    build = _BUILDERS.get(device.type)
    if build is None:
        if require_fused:
            raise RuntimeError(f"em_inf: a fused transform is required, but {device.type} has the eager one alone")
        return EagerTransform(vocab_size, device, max_rows)
    try:
        return build(vocab_size, device, max_rows)
    except Exception as error:  # whatever a compiler may raise: a slow transform is better than none
        if require_fused:
            raise RuntimeError(
                f"em_inf: a fused transform is required, but does not work here ({type(error).__name__}: {error})"
            ) from error
        logger.warning(
            "em_inf: the fast transform does not work here (%s: %s). Every token goes through the slow one.",
            type(error).__name__,
            error,
        )
        return EagerTransform(vocab_size, device, max_rows)


def _build_numba(vocab_size: int, device: torch.device, max_rows: int) -> Transform:
    from em_sampler.transforms.numba_cpu import NumbaTransform

    return NumbaTransform(vocab_size)


def _build_triton(vocab_size: int, device: torch.device, max_rows: int) -> Transform:
    from em_sampler.transforms.triton_cuda import TritonTransform

    return TritonTransform(vocab_size, device, max_rows)


_BUILDERS: dict[str, Callable[[int, torch.device, int], Transform]] = {"cpu": _build_numba, "cuda": _build_triton}


class ReusableTransform:
    """The fastest implementation for each call's logits, kept for later calls and rebuilt if a batch outgrows it.

    Threads may share it: calls take turns.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By vocabulary, device and CUDA stream; the latest used comes last. Each with the most rows it can take.
        self._kept: OrderedDict[tuple[int, torch.device, int], tuple[Transform, int]] = OrderedDict()

    def __call__(
        self, logits: Tensor, params: Sequence[Params | None], temperatures: Sequence[float] | None = None
    ) -> TransformOutput:
        """Transform `logits` [rows, vocab] float32 in place, row i by `params[i]`. The caller may keep the result."""
        packed = logits if _has_packed_rows(logits) else logits.contiguous()
        with self._lock, torch.cuda.device(logits.get_device()), torch.no_grad():  # -1: no GPU, so no change
            output = self._fitting(packed)(packed, BatchParams.of(params, logits.device, temperatures))
            stats = output.stats.clone()  # the next call may overwrite the original
            if packed is not logits:
                logits.copy_(packed)
        return TransformOutput(logits, stats)

    def _fitting(self, logits: Tensor) -> Transform:
        """Return an implementation that takes `logits`: the kept one or, if none fits, a new one."""
        rows, vocab = logits.shape
        # Calls on two CUDA streams may overlap on the device, so they must not share the memory of an implementation.
        stream = torch.cuda.current_stream(logits.device).cuda_stream if logits.is_cuda else 0
        key = vocab, logits.device, stream
        transform, max_rows = self._kept.get(key, (None, 0))
        if transform is None or rows > max_rows:
            max_rows = 1 << max(rows - 1, 0).bit_length()  # a power of 2, so that slow growth does not rebuild often
            with torch.inference_mode(False):  # memory allocated in inference mode could not be written outside of it
                transform = build_transform(vocab, logits.device, max_rows)
            self._kept[key] = transform, max_rows
        self._kept.move_to_end(key)
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return transform


def _has_packed_rows(logits: Tensor) -> bool:
    """Return whether each row's logits are adjacent in memory and no two rows overlap, as `Transform` requires."""
    (rows, vocab), (row_stride, stride) = logits.shape, logits.stride()
    return stride == 1 and (rows < 2 or row_stride >= vocab)


_shared = ReusableTransform()


def transform(
    logits: Tensor, params: Sequence[Params | None], temperatures: Sequence[float] | None = None
) -> TransformOutput:
    """Apply each row's method to `logits`, in place, with the fastest implementation for their device.

    The first call for a device and a vocabulary allocates memory and may compile; later calls reuse both.

    Args:
        logits: [rows, vocab] float32, on any device. -inf (a forbidden token) stays -inf.
        params: one entry per row; None leaves its row untouched.
        temperatures: at which each row is sampled afterwards, default 1; 0 is greedy. Only methods that remove tokens
            ask for it: the logits are not divided by it.

    Raises:
        ValueError: if shape, dtype or the number of params or temperatures do not fit, or a temperature is negative.

    Source: arXiv 2505.15134, section 4 and appendix A. `em_sampler.transforms.reference` is the float64 reference;
    `em_sampler.transforms.eager.transform` does the same in plain torch.
    """
    check_batch(logits, params, temperatures)
    return _shared(logits, params, temperatures)
