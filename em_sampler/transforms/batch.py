"""The contract between a batch of requests and the transforms: `BatchParams` in, `TransformOutput` out.

Knows nothing of vLLM or of how a transform computes (reference.py is the plainest implementation).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from em_sampler.params import AdaptiveTemperatureParams, EMInfParams, MeasureParams, Params

# A logit this far below its row's maximum has probability 0 in float32 at every temperature allowed: exp(-1e6 / 10).
# Standing in for -inf, it keeps 0 * -inf out of the sums.
MASKED_LOGIT = -1e6


class Method(IntEnum):
    """What to do with a row: the codes in `Column.METHOD`."""

    OFF = 0  # no method: the row is neither changed nor measured
    EM_INF = 1
    ADAPTIVE_TEMPERATURE = 2
    MEASURE = 3  # the method called "none": only the entropy is measured


class Column(IntEnum):
    """The columns of `BatchParams.values`. A column that a row's method does not use holds 0."""

    METHOD = 0  # a `Method`
    THRESHOLD = 1  # nats
    STEPS = 2
    LEARNING_RATE = 3
    KL_WEIGHT = 4
    ADAM = 5  # 1: adam, 0: sgd
    RATIO = 6
    MIN_TEMPERATURE = 7
    MAX_TEMPERATURE = 8


class TransformOutput(NamedTuple):
    """What a transform returns.

    An entropy is NaN if it was not measured: the row had no method, or the row was left as it was because it held NaN
    or +inf, or nothing but -inf.
    """

    logits: Tensor  # [rows, vocab] float32, the tensor that was passed in
    stats: (
        Tensor  # [3, rows] int32: entropy before, entropy after (the bits of a float32 each), steps; one copy moves all
    )

    @classmethod
    def of(cls, logits: Tensor, before: Tensor, after: Tensor, steps: Tensor) -> "TransformOutput":
        """Pack entropies before and after (float32, nats) and steps (int32), each [rows]."""
        return cls(logits, torch.stack((before.view(torch.int32), after.view(torch.int32), steps)))

    @property
    def entropy_before(self) -> Tensor:
        """[rows] float32, nats."""
        return self.stats[0].view(torch.float32)

    @property
    def entropy_after(self) -> Tensor:
        """[rows] float32, nats."""
        return self.stats[1].view(torch.float32)

    @property
    def steps(self) -> Tensor:
        """[rows] int32: gradient steps taken; 1 for a row that adaptive temperature scaled."""
        return self.stats[2]


@dataclass(frozen=True)
class BatchParams:
    """The params of every row of a batch."""

    values: Tensor  # [rows, len(Column)] float32, on the device of the logits
    # Over all rows, on the host, so that no loop has to ask the device. Only the eager form reads these two.
    max_steps: int | None  # None: no row has EM-INF
    any_adaptive: bool

    @classmethod
    def of(cls, params: Sequence[Params | None], device: torch.device | str = "cpu") -> "BatchParams":
        """Pack one row per entry of `params`; None leaves its row alone. The copy to a GPU is not waited for."""
        rows = np.array([pack_row(p) for p in params], dtype=np.float32).reshape(-1, len(Column))
        return cls(to_device(rows, torch.device(device)), *host_limits(params))

    def select(self, rows: Tensor) -> "BatchParams":
        """Return the params of `rows` (int64 [n])."""
        return BatchParams(self.values.index_select(0, rows), self.max_steps, self.any_adaptive)

    def __getitem__(self, column: Column) -> Tensor:
        """Return one column, [rows, 1]."""
        return self.values[:, column : column + 1]


@functools.lru_cache(maxsize=1024)  # a batch is packed again whenever a request comes or goes
def pack_row(params: Params | None) -> tuple[float, ...]:
    """Return one row of `BatchParams.values`, in the order of `Column`."""
    row = dict.fromkeys(Column, 0.0)
    if params is None:
        row[Column.METHOD] = Method.OFF
    elif isinstance(params, MeasureParams):
        row[Column.METHOD] = Method.MEASURE
    elif isinstance(params, EMInfParams):
        row |= {
            Column.METHOD: Method.EM_INF,
            Column.THRESHOLD: params.threshold,
            Column.STEPS: params.steps,
            Column.LEARNING_RATE: params.learning_rate,
            Column.KL_WEIGHT: params.kl_weight,
            Column.ADAM: params.optimizer == "adam",
        }
    else:
        row |= {
            Column.METHOD: Method.ADAPTIVE_TEMPERATURE,
            Column.THRESHOLD: params.threshold,
            Column.RATIO: params.ratio,
            Column.MIN_TEMPERATURE: params.min_temperature,
            Column.MAX_TEMPERATURE: params.max_temperature,
        }
    return tuple(row.values())


def to_device(rows: NDArray[np.float32], device: torch.device) -> Tensor:
    """Copy `rows` to `device` without waiting for it. The caller may overwrite `rows` at once."""
    values = torch.from_numpy(rows)
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)  # without pinned memory, the copy would wait
    return values.to(device, copy=True)


def host_limits(params: Sequence[Params | None]) -> tuple[int | None, bool]:
    """Return (max_steps, any_adaptive) over all of `params`."""
    steps = [p.steps for p in params if isinstance(p, EMInfParams)]
    return max(steps, default=None), any(isinstance(p, AdaptiveTemperatureParams) for p in params)


def check_batch(logits: Tensor, params: Sequence[Params | None]) -> None:
    """Check that a caller's logits and params fit together.

    Raises:
        ValueError: if the logits are not [rows, vocab] float32 with at least one logit per row, or `params` does not
            have one entry per row.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [rows, vocab] float32, got {list(logits.shape)} {logits.dtype}")
    if len(params) != logits.shape[0]:
        raise ValueError(f"one entry of params per row: got {len(params)} for {logits.shape[0]} rows")


class Transform(Protocol):
    """An implementation with its memory allocated once, for a caller that transforms a batch at every step.

    An implementation is built for a vocabulary size, a device and a largest number of rows (dispatch.build_transform).
    """

    name: str  # as operators see it

    def __call__(self, logits: Tensor, params: BatchParams) -> TransformOutput:
        """Transform `logits` [rows, vocab] float32 in place, row i by row i of `params`.

        The logits of a row are adjacent in memory; the rows may lie apart. `stats` may be overwritten by the next call.
        """
