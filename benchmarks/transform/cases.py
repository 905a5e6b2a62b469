"""What the benchmark of the transform measures: cases, sweeps over them, and the parameters of their rows.

A sweep changes one property at a time, starting from a base case; the targets are variants of the same base case.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from benchmarks.transform.logits import Origin
from em_sampler.params import (
    MAX_THRESHOLD,
    AdaptiveTemperatureParams,
    EMInfParams,
    GreedyBelowParams,
    MeasureParams,
    Params,
    PLessParams,
    TopHParams,
    TopNSigmaParams,
)

Method = Literal["adam", "sgd", "adaptive", "mixed", "p_less", "top_h", "top_n_sigma", "greedy_below"]
TRUNCATIONS: dict[Method, Params] = {
    "p_less": PLessParams(),
    "top_h": TopHParams(),
    "top_n_sigma": TopNSigmaParams(),
    "greedy_below": GreedyBelowParams(p_max=1),  # cuts every row
}


@dataclass(frozen=True)
class Case:
    """One batch: its size, its logits and the parameters of its rows."""

    rows: int
    vocab: int
    steps: int = 5
    share: float = 1.0  # of the rows that are active; the others are measured and not changed
    origin: Origin = "bfloat16"
    method: Method = "adam"  # mixed: adam, sgd, adaptive temperature, nothing, measure, row by row in turn
    temperature: float = 1.0  # of the requests

    def params(self) -> list[Params | None]:
        """Return an entry for each row: threshold 0 if it is active, above any entropy if it is idle.

        A method that removes tokens has no threshold: an idle row is measured.
        """
        idle = [math.floor((i + 1) * self.share + 1e-9) == math.floor(i * self.share + 1e-9) for i in range(self.rows)]
        return [self._row(i, MAX_THRESHOLD if idle[i] else 0.0) for i in range(self.rows)]

    def _row(self, number: int, threshold: float) -> Params | None:
        if self.method in TRUNCATIONS:
            return MeasureParams() if threshold else TRUNCATIONS[self.method]
        every: dict[str, Params | None] = {
            "adam": EMInfParams(threshold=threshold, steps=self.steps),
            "sgd": EMInfParams(threshold=threshold, steps=self.steps, optimizer="sgd"),
            "adaptive": AdaptiveTemperatureParams(threshold=threshold),
            "none": None,
            "measure": MeasureParams(),
        }
        return list(every.values())[number % len(every)] if self.method == "mixed" else every[self.method]

    def __str__(self) -> str:
        text = f"{self.rows} x {self.vocab}, {self.method}, {self.steps} steps, {self.share:g} active, {self.origin}"
        return text if self.temperature == 1 else f"{text}, temperature {self.temperature:g}"


@dataclass(frozen=True)
class Sizes:
    """The sizes that a run sweeps over. The base case has `base_rows` rows and the vocabulary `base_vocab`."""

    rows: tuple[int, ...]
    vocabs: tuple[int, ...]
    base_rows: int
    base_vocab: int
    steps: tuple[int, ...] = (1, 5, 15, 64)
    shares: tuple[float, ...] = (0.0, 0.2, 1.0)
    grid: bool = False  # whether `ours` also does every number of rows with every vocabulary

    @property
    def base(self) -> Case:
        return Case(self.base_rows, self.base_vocab)

    def sweep(self) -> list[Case]:
        """Return the cases that differ from the base case in one property; every implementation that can runs these."""
        base = self.base
        cases = [replace(base, rows=rows) for rows in self.rows]
        cases += [replace(base, vocab=vocab) for vocab in self.vocabs]
        cases += [replace(base, steps=steps) for steps in self.steps]
        cases += [replace(base, share=share) for share in self.shares]
        cases += [replace(base, origin="float32"), replace(base, origin="penalised")]
        cases += [replace(base, method="sgd"), replace(base, method="adaptive"), replace(base, method="mixed")]
        cases += [replace(base, method=method) for method in TRUNCATIONS]
        return unique(cases)

    def every_size(self) -> list[Case]:
        """Return a case for every number of rows with every vocabulary."""
        return [replace(self.base, rows=rows, vocab=vocab) for rows, vocab in product(self.rows, self.vocabs)]


VOCABS = (32_000, 128_256, 151_936, 262_144)
CPU = Sizes(rows=(1, 4, 16, 64, 256), vocabs=VOCABS, base_rows=16, base_vocab=151_936)
CUDA = Sizes(rows=(1, 4, 16, 64, 256, 512, 1024), vocabs=VOCABS, base_rows=256, base_vocab=151_936, grid=True)
QUICK = Sizes(rows=(1, 5), vocabs=(500, 2_000), base_rows=5, base_vocab=2_000, steps=(1, 5))


def unique(cases: Iterable[Case]) -> list[Case]:
    """Return each case once, in the order of its first occurrence."""
    return list(dict.fromkeys(cases))


def limited(sizes: Sizes, rows: tuple[int, ...] | None, vocabs: tuple[int, ...] | None) -> Sizes:
    """Return `sizes` with other rows or vocabularies; the base case becomes the largest if they do not include it."""
    rows, vocabs = rows or sizes.rows, vocabs or sizes.vocabs
    base_rows = sizes.base_rows if sizes.base_rows in rows else max(rows)
    base_vocab = sizes.base_vocab if sizes.base_vocab in vocabs else max(vocabs)
    return replace(sizes, rows=rows, vocabs=vocabs, base_rows=base_rows, base_vocab=base_vocab)
