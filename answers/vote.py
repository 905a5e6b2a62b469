"""A vote over answers: who leads, and whether the rest can still change it. Knows nothing of models."""

import math
from collections import defaultdict
from fractions import Fraction
from statistics import fmean


class Vote:
    """The votes so far. An answer's tie-breaker is the mean of its voters' `preference`."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self.weights: dict[str, float] = defaultdict(float)
        self.preferences: dict[str, list[float]] = defaultdict(list)

    def add(self, answer: str, preference: float, weight: float = 1.0) -> None:
        """One more voter."""
        self.counts[answer] += 1
        self.weights[answer] += weight
        self.preferences[answer].append(preference)

    def ranking(self) -> list[str]:
        """Answers, the leader first."""
        return sorted(self.counts, key=lambda answer: (-self.weights[answer], -fmean(self.preferences[answer])))

    def decided(self, remaining: int, heaviest: float = 1.0) -> bool:
        """Whether no outcome of `remaining` votes, each of at most the weight `heaviest`, can unseat the leader, not
        even by a tie."""
        leader, second = self._leading()
        return leader > second + remaining * heaviest

    def posterior(self) -> float:
        """The leader's probability of being more frequent than the second, from a uniform prior: with v1 and v2 votes
        P(p > 1/2) under Beta(v1 + 1, v2 + 1), the stopping rule of Adaptive-Consistency (arXiv 2305.11860)."""
        first, second, *_ = [*sorted(self.counts.values(), reverse=True), 0, 0]
        # The same as a binomial tail: at most `first` heads in first + second + 1 tosses.
        tosses = first + second + 1
        return float(Fraction(sum(math.comb(tosses, heads) for heads in range(first + 1)), 2**tosses))

    def agreement(self) -> float | None:
        """The share of the votes that the leader has, 0 to 1; None without votes."""
        return self.weights[self.ranking()[0]] / sum(self.weights.values()) if self.counts else None

    def _leading(self) -> tuple[float, float]:
        first, second, *_ = [*sorted(self.weights.values(), reverse=True), 0.0, 0.0]
        return first, second
