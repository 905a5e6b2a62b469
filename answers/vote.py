"""A vote over answers: which one leads, and whether the remaining votes can still change that.

Knows answers as strings; where they come from is the caller's business.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from fractions import Fraction
from statistics import fmean


class Vote:
    """The votes so far. Of two answers with equal weight, the one with the higher mean `tie_break` leads."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self.weights: dict[str, float] = defaultdict(float)
        self.tie_breaks: dict[str, list[float]] = defaultdict(list)

    def add(self, answer: str, tie_break: float, weight: float = 1.0) -> None:
        """Add one vote for `answer`."""
        self.counts[answer] += 1
        self.weights[answer] += weight
        self.tie_breaks[answer].append(tie_break)

    def ranking(self) -> list[str]:
        """Return the answers, the leader first."""
        return sorted(self.counts, key=lambda answer: (-self.weights[answer], -fmean(self.tie_breaks[answer])))

    def agreement(self) -> float | None:
        """Return the leader's share of the weights, 0 to 1; None without votes."""
        return self.weights[self.ranking()[0]] / sum(self.weights.values()) if self.counts else None

    def is_decided(self, remaining: int, max_weight: float = 1.0) -> bool:
        """Return whether `remaining` more votes, each of at most `max_weight`, cannot even tie with the leader."""
        first, second = _top_two(self.weights.values())
        return first > second + remaining * max_weight

    def leader_probability(self) -> float:
        """Return the probability that the leader is more frequent than the second answer, given the votes so far.

        With v1 and v2 votes it is P(p > 1/2) under Beta(v1 + 1, v2 + 1), the posterior from a uniform prior.
        Source: the stopping rule of Adaptive-Consistency, arXiv 2305.11860.
        """
        first, second = (int(count) for count in _top_two(self.counts.values()))
        # Equal to a binomial tail: at most `first` heads in first + second + 1 tosses.
        tosses = first + second + 1
        return float(Fraction(sum(math.comb(tosses, heads) for heads in range(first + 1)), 2**tosses))


def _top_two(values: Iterable[float]) -> tuple[float, float]:
    """Return the largest and the second largest value; 0 for each that is lacking."""
    first, second, *_ = [*sorted(values, reverse=True), 0, 0]
    return first, second
