"""What a batch asks of a transform, and what every transform returns: the contract of its implementations.

Knows nothing of requests, vLLM, or how it is computed (torch_batched.py is the reference).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from em_sampler.params import AdaptiveTemperatureParams, EMInfParams, MeasureParams, Params

NO_METHOD, EM_INF, ADAPTIVE, MEASURE = 0.0, 1.0, 2.0, 3.0
PARAM_COLUMNS = ("method", "threshold", "steps", "learning_rate", "kl_weight", "adam", "ratio", "min_t", "max_t")


class TransformOutput(NamedTuple):
    """What a transform returns.

    An entropy is NaN where it was not measured: the row had no method, or it was passed through because it held NaN or
    +inf (or nothing but -inf).
    """

    logits: Tensor  # [rows, vocab] float32, the tensor that was passed in
    statistics: Tensor  # [3, rows] int32: what follows, a float by its bits, so that it travels in one piece

    @classmethod
    def of(cls, logits: Tensor, before: Tensor, after: Tensor, steps: Tensor) -> "TransformOutput":
        """From the three apart, each [rows]."""
        return cls(logits, torch.stack((before.view(torch.int32), after.view(torch.int32), steps)))

    @property
    def entropy_before(self) -> Tensor:
        """[rows] float32, nats."""
        return self.statistics[0].view(torch.float32)

    @property
    def entropy_after(self) -> Tensor:
        """[rows] float32, nats."""
        return self.statistics[1].view(torch.float32)

    @property
    def steps(self) -> Tensor:
        """[rows] int32: gradient steps taken; 1 for a row that adaptive temperature scaled."""
        return self.statistics[2]


@dataclass(frozen=True)
class BatchParams:
    """The parameters of every row of a batch."""

    values: Tensor  # [rows, len(COLUMNS)] float32, on the device of the logits
    max_steps: int | None  # over all rows, known on the host so that no loop has to ask the device; None: no EM-INF
    any_adaptive: bool

    @classmethod
    def of(cls, params: Sequence[Params | None], device: torch.device | str = "cpu") -> "BatchParams":
        """One row for each entry of `params`; None leaves its row alone."""
        rows = np.array([pack_row(p) for p in params], dtype=np.float32).reshape(-1, len(PARAM_COLUMNS))
        values = torch.from_numpy(rows)
        if torch.device(device).type == "cuda":
            values = values.pin_memory()  # without it, the copy would wait for the device
        return cls(values.to(device, non_blocking=True), *host_limits(params))

    def take(self, rows: Tensor) -> "BatchParams":
        """The parameters of `rows` (int64 [n])."""
        return BatchParams(self.values.index_select(0, rows), self.max_steps, self.any_adaptive)

    def __getitem__(self, name: str) -> Tensor:  # [rows, 1]
        index = PARAM_COLUMNS.index(name)
        return self.values[:, index : index + 1]


@functools.lru_cache(maxsize=1024)  # a batch is encoded anew whenever a request comes or goes
def pack_row(params: Params | None) -> tuple[float, ...]:
    """One row of `RowParams.values`."""
    if params is None or isinstance(params, MeasureParams):
        return (NO_METHOD if params is None else MEASURE, *[0.0] * (len(PARAM_COLUMNS) - 1))
    if isinstance(params, EMInfParams):
        adam = float(params.optimizer == "adam")
        return (EM_INF, params.threshold, params.steps, params.learning_rate, params.kl_weight, adam, 0.0, 0.0, 0.0)
    temperatures = params.min_temperature, params.max_temperature
    return (ADAPTIVE, params.threshold, 1.0, 0.0, 0.0, 0.0, params.ratio, *temperatures)


def host_limits(params: Sequence[Params | None]) -> tuple[int | None, bool]:
    """(max_steps, any_adaptive) over all of `params`."""
    steps = [p.steps for p in params if isinstance(p, EMInfParams)]
    return max(steps, default=None), any(isinstance(p, AdaptiveTemperatureParams) for p in params)


def check_batch(logits: Tensor, params: Sequence[Params | None]) -> None:
    """Check that a caller's logits and parameters fit together.

    Raises:
        ValueError: if the logits are not [rows, vocab] float32, or `params` has not one entry per row.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be [rows, vocab] float32, got {list(logits.shape)} {logits.dtype}")
    if len(params) != logits.shape[0]:
        raise ValueError(f"one entry of params per row: got {len(params)} for {logits.shape[0]} rows")


class Transform(Protocol):
    """An implementation, made once for an engine that calls it at every step: `(vocab_size, device, max_rows)`."""

    def __call__(self, logits: Tensor, params: BatchParams) -> TransformOutput:
        """Transform `logits` [rows, vocab] float32 in place, row i by row i of `params`."""
