"""The transform on CUDA in Triton: six launches per batch, whatever its rows, their params and the number of steps.

What the kernels do: triton_kernels.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from em_sampler.transforms import triton_kernels as kernels
from em_sampler.transforms.batch import STATS, BatchParams, TransformOutput

MAX_GROUP_ROWS = 512  # of one launch: 134 kB of memory each
# At most, of the kernels that share the chunks of active rows: three run on each of an H100's 132 multiprocessors.
SHARING_PROGRAMS = 396

# In the order of their launch: (kernel, warps of a program, particles of a program).
LAUNCHES: tuple[tuple[Any, int, int | None], ...] = (
    (kernels.row_stats_kernel, 8, None),
    (kernels.row_scalars_kernel, 4, None),
    (kernels.histogram_kernel, 16, None),
    (kernels.solve_kernel, 8, kernels.NARROW.value),
    (kernels.solve_kernel, 32, kernels.PARTICLES.value),
    (kernels.apply_kernel, 16, None),
)

IS_INTERPRETED = not isinstance(kernels.apply_kernel, triton.JITFunction)  # by Triton's interpreter

Grid = tuple[int, int, int]
Arguments = tuple[Any, ...]


class TritonTransform:
    """The implementation for CUDA: no host synchronisation and no allocation in a call, results equal to the bit.

    Building it allocates all memory and compiles all code. The next call overwrites the stats that a call returned. No
    call depends on what an earlier one left in memory.
    """

    name = "triton_cuda"

    def __init__(self, vocab_size: int, device: torch.device, max_rows: int) -> None:
        self.vocab_size, self.max_rows = vocab_size, max(max_rows, 1)
        self.splits = triton.cdiv(vocab_size, kernels.CHUNK.value)
        self.group_rows = min(self.max_rows, MAX_GROUP_ROWS)
        self.stats = torch.empty(STATS, self.max_rows, dtype=torch.int32, device=device)

        def memory(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(self.group_rows, *shape, dtype=dtype, device=device)

        self.partials = memory(torch.float32, self.splits, kernels.PARTIALS.value)
        self.scalars = memory(torch.float32, kernels.SCALARS.value)
        self.active = torch.empty(1 + self.group_rows, dtype=torch.int32, device=device)  # how many rows, which
        self.counts = memory(torch.int64, kernels.CELLS.value)
        self.heavy = memory(torch.int64, kernels.HEAVY.value)  # x, later the move, and the token of each heavy logit
        self.heavy_counts = memory(torch.int32, self.splits)
        self.heavy_from = memory(torch.float32, self.splits)  # the chunk's bound: see `histogram_kernel`
        self.order = memory(torch.int32, kernels.PARTICLES.value)  # of the particles: cells, then heavy logits
        self.particle_counts = memory(torch.int32)
        self.moves = memory(torch.int64, kernels.CELLS.value)  # see `_descend`
        self.history = memory(torch.float32, kernels.HISTORY.value, kernels.STEP_SCALARS.value)
        nothing = BatchParams.of([None], device)
        # By whether rows begin at multiples of 16 bytes. Both are compiled here, so that no batch waits for a compiler.
        self.compiled: dict[bool, list[Callable[..., None]]] = {}
        width = triton.cdiv(vocab_size, 64) * 64
        for padding, offset in ((0, 0), (1, 1)):
            logits = torch.zeros(2 * (width + 1) + 1, device=device)[offset : offset + 2 * (width + padding)]
            logits = logits.view(2, -1)[:1, :vocab_size]
            self.compiled[_has_aligned_rows(logits)] = self._compile(logits, nothing)
            self(logits, nothing)

    def __call__(self, logits: Tensor, params: BatchParams) -> TransformOutput:
        """Transform `logits` [rows, vocab] float32 in place, row i by row i of `params`.

        Raises:
            ValueError: if the batch is not what the transform was built for.
        """
        rows = len(logits)
        if rows > self.max_rows or logits.shape[1] != self.vocab_size or logits.stride(1) != 1:
            raise ValueError(
                f"logits must be at most {self.max_rows} rows x {self.vocab_size}, each row adjacent in memory: "
                f"got {list(logits.shape)} with strides {list(logits.stride())}"
            )
        compiled = self.compiled[_has_aligned_rows(logits)]
        if 0 < rows <= self.group_rows:  # as nearly always: slices would take as long as the launches
            self._launch(compiled, logits, params.values, self.stats)
        else:
            for start in range(0, rows, self.group_rows):
                group = slice(start, start + self.group_rows)
                self._launch(compiled, logits[group], params.values[group], self.stats[:, group])
        return TransformOutput(logits, self.stats[:, :rows])

    def _launch(self, compiled: list[Callable[..., None]], logits: Tensor, params: Tensor, stats: Tensor) -> None:
        stream = _current_stream()
        for kernel, (grid, arguments) in zip(compiled, self._launches(logits, params, stats), strict=True):
            kernel(grid, stream, *arguments)

    def _launches(self, logits: Tensor, params: Tensor, stats: Tensor) -> tuple[tuple[Grid, Arguments], ...]:
        """Return the (grid, arguments) of each of LAUNCHES for a group of rows."""
        rows = len(logits)
        chunks, row, results = (logits, logits.stride(0)), (params, self.scalars), (stats, self.stats.stride(0))
        heavy = self.heavy, self.heavy_counts
        solve: Arguments = (*chunks, *row, self.counts, *heavy, self.heavy_from, self.order, self.particle_counts)
        solve += (self.moves, self.history, *results)
        active, shared = (*row, self.active), (min(self.splits * rows, SHARING_PROGRAMS), 1, 1)
        return (
            ((self.splits, rows, 1), (*chunks, params, self.partials, self.active)),
            ((rows, 1, 1), (params, self.partials, self.scalars, self.active, self.counts, *results)),
            (shared, (*chunks, *active, self.counts, *heavy, self.heavy_from)),
            ((rows, 1, 1), solve),
            ((rows, 1, 1), solve),
            (shared, (*chunks, *active, *heavy, self.heavy_from, self.moves, self.history, *results)),
        )

    def _compile(self, logits: Tensor, params: BatchParams) -> list[Callable[..., None]]:
        """Compile the kernels for batches whose rows are aligned like `logits`: what takes a grid and arguments."""
        splits_pow2 = triton.next_power_of_2(self.splits)
        sizes: dict[str, int | None] = {"VOCAB": self.vocab_size, "SPLITS": self.splits, "SPLITS_POW2": splits_pow2}
        sizes["SLOTS"] = kernels.HEAVY.value // splits_pow2  # for heavy logits, in every chunk of a row
        return [
            _compile_kernel(kernel, arguments, sizes | {"WIDTH": particles}, warps)
            for (kernel, warps, particles), (_, arguments) in zip(
                LAUNCHES, self._launches(logits, params.values, self.stats), strict=True
            )
        ]


def _has_aligned_rows(logits: Tensor) -> bool:
    """Return whether every row begins at a multiple of 16 bytes, and, as Triton asks, 16 logits from the next."""
    return logits.data_ptr() % 16 == 0 and logits.stride(0) % 16 == 0


def _current_stream() -> int:
    """Return the stream of the current device that work goes to. Triton itself would ask again for each launch."""
    if IS_INTERPRETED:
        return 0
    driver = triton.runtime.driver.active
    return int(driver.get_current_stream(driver.get_current_device()))


def _compile_kernel(
    kernel: Any, arguments: Arguments, constants: dict[str, int | None], warps: int
) -> Callable[..., None]:
    """Compile `kernel` for arguments like `arguments`; return a function of its grid, a stream and such arguments.

    It launches the compiled kernel as Triton itself does in the end. Triton's way there takes many times as long: it
    compares every global and specialises every argument again.
    """
    constants = {name: constants[name] for name in kernel.arg_names if name.isupper()}
    if IS_INTERPRETED:
        return lambda grid, _, *arguments: kernel[grid](*arguments, **constants)
    # With 40 registers a thread, three programs of 16 warps run on a multiprocessor at a time.
    registers = 40 if warps == 16 else None
    # No fused multiply-add: p - p0 must be exactly 0 until something has moved.
    compiled = kernel.warmup(
        *arguments, **constants, grid=(1,), num_warps=warps, maxnreg=registers, enable_fp_fusion=False
    )
    run, values = compiled.run, tuple(constants.values())
    fixed = compiled.function, compiled.packed_metadata, None, None, None  # no launch metadata and no hooks
    return lambda grid, stream, *arguments: run(*grid, stream, *fixed, *arguments, *values)
