"""The contract between a batch of requests and the transforms: `BatchParams` in, `TransformOutput` out.

Knows nothing of vLLM or of how a transform computes (reference.py is the plainest implementation).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from em_sampler.params import EMInfParams, Params

# A logit this far below its row's maximum has probability 0 in float32 at every temperature allowed: exp(-1e6 / 10).
# Standing in for -inf, it keeps 0 * -inf out of the sums.
MASKED_LOGIT = -1e6
ROUNDING = 4e-6  # relative, of float32's sums over a row: a method's bound that is met to within it is met
STATS = 4  # numbers that a transform measures of a row


class Method(IntEnum):
    """What to do with a row: the codes in `Column.METHOD`."""

    OFF = 0  # no method: the row is neither changed nor measured
    EM_INF = 1
    ADAPTIVE_TEMPERATURE = 2
    MEASURE = 3  # the method called "none": only the entropy is measured
    # These remove tokens (the request's temperature counts); codes from P_LESS up are truncating methods.
    P_LESS = 4
    TOP_H = 5
    TOP_N_SIGMA = 6
    GREEDY_BELOW = 7


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
    TEMPERATURE = 9  # the request's
    NORMALIZED = 10  # 1: yes
    ALPHA = 11
    N = 12
    P_MAX = 13
    STATS = 14  # 1: the request wants stats, so the varentropy is measured too


class TransformOutput(NamedTuple):
    """What a transform returns.

    An entropy is NaN if it was not measured: the row had no method, or the row was left as it was because it held NaN
    or +inf, or nothing but -inf.
    """

    logits: Tensor  # [rows, vocab] float32, the tensor that was passed in
    # [STATS, rows] int32: entropy before, entropy after, varentropy (the bits of a float32 each), steps. One copy moves
    # all of them.
    stats: Tensor

    @classmethod
    def of(cls, logits: Tensor, before: Tensor, after: Tensor, varentropy: Tensor, steps: Tensor) -> "TransformOutput":
        """Pack entropies before and after and the varentropy (float32, nats) and steps (int32), each [rows]."""
        floats = (each.view(torch.int32) for each in (before, after, varentropy))
        return cls(logits, torch.stack((*floats, steps)))

    @property
    def entropy_before(self) -> Tensor:
        """[rows] float32, nats."""
        return self.stats[0].view(torch.float32)

    @property
    def entropy_after(self) -> Tensor:
        """[rows] float32, nats."""
        return self.stats[1].view(torch.float32)

    @property
    def varentropy(self) -> Tensor:
        """[rows] float32, nats squared: Var_p[log p] before the method. NaN unless the row's params ask for stats."""
        return self.stats[2].view(torch.float32)

    @property
    def steps(self) -> Tensor:
        """[rows] int32: gradient steps taken; 1 if adaptive temperature scaled the row, CUT if it lost tokens."""
        return self.stats[3]


@dataclass(frozen=True)
class BatchParams:
    """The params of every row of a batch."""

    values: Tensor  # [rows, len(Column)] float32, on the device of the logits
    # Over all rows, on the host, so that no loop has to ask the device. Only the eager form reads these two.
    max_steps: int  # of EM-INF; 0 if no row has it
    methods: frozenset[str]  # names, as in `em_sampler.params.METHODS`

    @classmethod
    def of(
        cls,
        params: Sequence[Params | None],
        device: torch.device | str = "cpu",
        temperatures: Sequence[float] | None = None,
    ) -> "BatchParams":
        """Pack one row per entry of `params`; None leaves its row alone. The copy to a GPU is not waited for.

        `temperatures`: the requests', default 1. Only methods that remove tokens ask for them.
        """
        packed = map(pack_row, params, temperatures or [1.0] * len(params))
        rows = np.array([*packed], dtype=np.float32).reshape(-1, len(Column))
        return cls(to_device(rows, torch.device(device)), *host_limits(params))

    def select(self, rows: Tensor) -> "BatchParams":
        """Return the params of `rows` (int64 [n])."""
        return BatchParams(self.values.index_select(0, rows), self.max_steps, self.methods)

    def __getitem__(self, column: Column) -> Tensor:
        """Return one column, [rows, 1]."""
        return self.values[:, column : column + 1]


@functools.lru_cache(maxsize=1024)  # a batch is packed again whenever a request comes or goes
def pack_row(params: Params | None, temperature: float = 1.0) -> tuple[float, ...]:
    """Return one row of `BatchParams.values`, in the order of `Column`. `temperature` is the request's."""
    row = dict.fromkeys(Column, 0.0)
    if params is None:
        row[Column.METHOD] = Method.OFF
        return tuple(row.values())
    fields = {name.upper(): value for name, value in params}
    row |= {column: fields[column.name] for column in Column if column.name in fields}
    row[Column.ADAM] = fields.get("OPTIMIZER") == "adam"
    row[Column.TEMPERATURE] = temperature
    row[Column.STATS] = params.stats != "none"
    row[Column.METHOD] = Method.MEASURE if params.method == "none" else Method[params.method.upper()]
    if row[Column.METHOD] >= Method.P_LESS and temperature == 0:
        row[Column.METHOD] = Method.MEASURE  # greedy: the top token is never removed
    return tuple(row.values())


def to_device(rows: NDArray[np.float32], device: torch.device) -> Tensor:
    """Copy `rows` to `device` without waiting for it. The caller may overwrite `rows` at once."""
    values = torch.from_numpy(rows)
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)  # without pinned memory, the copy would wait
    return values.to(device, copy=True)


def host_limits(params: Sequence[Params | None]) -> tuple[int, frozenset[str]]:
    """Return (max_steps, methods) over all of `params`."""
    steps = [p.steps for p in params if isinstance(p, EMInfParams)]
    return max(steps, default=0), frozenset(p.method for p in params if p)


def check_batch(logits: Tensor, params: Sequence[Params | None], temperatures: Sequence[float] | None = None) -> None:
    """Check that a caller's logits, params and temperatures fit together.

    Raises:
        ValueError: if the logits are not [rows, vocab] float32 with at least one logit per row, `params` or
            `temperatures` does not have one entry per row, or a temperature is negative, infinite or NaN.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [rows, vocab] float32, got {list(logits.shape)} {logits.dtype}")
    if len(params) != logits.shape[0]:
        raise ValueError(f"one entry of params per row: got {len(params)} for {logits.shape[0]} rows")
    if temperatures is None:
        return
    if len(temperatures) != logits.shape[0]:
        raise ValueError(f"one temperature per row: got {len(temperatures)} for {logits.shape[0]} rows")
    for temperature in temperatures:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperatures must be 0 or above and finite, got {temperature}")


class Transform(Protocol):
    """An implementation with its memory allocated once, for a caller that transforms a batch at every step.

    An implementation is built for a vocabulary size, a device and a largest number of rows (dispatch.build_transform).
    """

    name: str  # as operators see it

    def __call__(self, logits: Tensor, params: BatchParams) -> TransformOutput:
        """Transform `logits` [rows, vocab] float32 in place, row i by row i of `params`.

        The logits of a row are adjacent in memory; the rows may lie apart. `stats` may be overwritten by the next call.
        """
