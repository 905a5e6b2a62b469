"""Admission control: how many branches may be in flight in this process, over all requests."""


class TooManyBranchesError(Exception):
    """A request needs more branches than are free now."""


class BranchLimit:
    """The number of branches that requests have reserved, at most `limit`. Used on the event loop alone, so no lock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    def acquire(self, branches: int) -> None:
        """Reserve `branches`.

        Raises:
            TooManyBranchesError: if fewer are free.
        """
        if self.taken + branches > self.limit:
            free = self.limit - self.taken
            raise TooManyBranchesError(f"{branches} branches asked for, {free} of {self.limit} places are free")
        self.taken += branches

    def release(self, branches: int) -> None:
        """Return `branches` that `acquire` reserved."""
        self.taken -= branches
