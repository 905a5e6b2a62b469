"""The functions that a GPU only approximates, wrong by as much as the PTX manual allows.

An error is a function of the operands' bits and of a seed, as on a GPU: equal operands give equal results.
"""

from dataclasses import dataclass

import numpy as np

from tests.ptx.memory import Lanes


@dataclass
class Approximations:
    """`scale` 1 errs up to the manual's bounds, 0 rounds correctly. `seed` chooses among the errors."""

    scale: float = 1.0
    seed: int = 0

    def _approximate(self, exact: Lanes, bound: float, *operands: Lanes) -> Lanes:
        """Return `exact` as float32, off by at most `bound`, relative, the final rounding included."""
        mixed = np.full(1, self.seed + 1, np.uint64)
        for operand in operands:
            bits = np.ascontiguousarray(operand).view(np.uint32).astype(np.uint64)
            mixed = (mixed ^ bits) * np.uint64(0x9E3779B97F4A7C15)
            mixed = mixed ^ (mixed >> np.uint64(29))
        mixed = (mixed * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(48)
        error = mixed / 32767.5 - 1  # from -1 to 1
        return np.where(np.isfinite(exact), exact * (1 + error * (bound - 2**-24) * self.scale), exact)

    def ex2(self, x: Lanes) -> Lanes:
        """Return 2^x. Hardware is exact at integers, and next to 0 nothing but 1 can come out."""
        exact = np.exp2(x.astype(np.float64))
        off = self._approximate(exact, 2**-22, x)
        return np.where(x == np.floor(x), exact, np.where(np.abs(x) < 2**-24, 1, off))

    def sqrt(self, x: Lanes) -> Lanes:
        """Return the square root."""
        return self._approximate(np.sqrt(x.astype(np.float64)), 2**-23, x)

    def div(self, a: Lanes, b: Lanes) -> Lanes:
        """Return a / b within 2 units in the last place; exact by a power of two, as hardware multiplies by 1 / b."""
        exact = a.astype(np.float64) / b.astype(np.float64)
        mantissa, _ = np.frexp(np.abs(b.astype(np.float64)))
        return np.where(mantissa == 0.5, exact, self._approximate(exact, 2**-22.5, a, b))
