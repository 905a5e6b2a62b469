"""The likeliest candidates of sampled tokens, and the mean entropy that their distributions have at any temperature.

Log-probabilities are those at temperature 1. What the candidates leave out counts as more candidates like the least.
"""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
NONE = -1e9  # the logarithm of how many candidates an empty place stands for; exp is 0
MIN_REST = 1e-6  # probability beyond the candidates; less is rounding
MAX_REST = 1e6  # candidates beyond those listed; no vocabulary has more


class Candidates:
    """The candidates of all tokens of some replies."""

    def __init__(self, tokens: Iterable[Sequence[float]]) -> None:
        """`tokens`: the log-probabilities of each token's likeliest candidates; a token without any is skipped."""
        rows = [row for row in tokens if row]
        width = max(map(len, rows), default=0) + 1  # the last column: the candidates that are not listed
        self._logprobs = np.zeros((len(rows), width))  # [tokens, candidates + 1]
        self._counts = np.full((len(rows), width), NONE)  # [tokens, candidates + 1]: logarithms
        for i, row in enumerate(rows):
            self._logprobs[i, : len(row)] = row
            self._logprobs[i, len(row) :] = min(row)
            self._counts[i, : len(row)] = 0.0
        listed = np.exp(self._logprobs + self._counts).sum(axis=1)
        rest = 1.0 - listed
        some = rest > MIN_REST
        self._counts[some, -1] = np.minimum(np.log(rest[some]) - self._logprobs[some, -1], np.log(MAX_REST))

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self._logprobs)

    def entropies(self, temperature: float) -> Floats:
        """Return the entropy of each token's distribution at a temperature, in nats: [tokens]."""
        scaled = self._logprobs / temperature
        weights = scaled + self._counts
        top = weights.max(axis=1, keepdims=True)
        shares = np.exp(weights - top)
        total = shares.sum(axis=1)
        entropies: Floats = np.log(total) + top[:, 0] - (shares * scaled).sum(axis=1) / total
        return np.maximum(entropies, 0.0)

    def mean_entropy(self, temperature: float) -> float:
        """Return the mean entropy per token at a temperature, in nats."""
        return float(self.entropies(temperature).mean())
