"""Admission control: how many branches may be in flight in this process, over all requests."""

import math

LOGPROBS_PER_PLACE = 5


class TooManyBranchesError(Exception):
    """A request needs more places than are free now."""


class BranchLimit:
    """The places that requests have reserved, at most `limit`. Used on the event loop alone, so no lock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    def places(self, branches: int, logprobs: int) -> int:
        """Return the places that `branches` take: one each, and more for the log-probabilities that they keep.

        Args:
            branches: those that run at the same time.
            logprobs: log-probabilities per token that the client asked for; one more place for each LOGPROBS_PER_PLACE
                or part of them. A request is never kept out by this alone: alone on the server, it gets all places.
        """
        weighted = branches * (1 + math.ceil(logprobs / LOGPROBS_PER_PLACE))
        return max(branches, min(weighted, self.limit))

    def acquire(self, places: int) -> None:
        """Reserve `places`.

        Raises:
            TooManyBranchesError: if fewer are free.
        """
        if self.taken + places > self.limit:
            free = self.limit - self.taken
            raise TooManyBranchesError(f"{places} places asked for, {free} of {self.limit} are free")
        self.taken += places

    def release(self, places: int) -> None:
        """Return `places` that `acquire` reserved."""
        self.taken -= places
