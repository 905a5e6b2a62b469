"""What limits how much work is admitted: branches in flight, over all requests of this process."""


class TooManyBranchesError(Exception):
    """More branches than the server has left."""


class BranchLimit:
    """How many branches may be in flight in this process, over all requests."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    def acquire(self, branches: int) -> None:
        """Take `branches` of the limit.

        Raises:
            TooManyBranchesError: if fewer are left.
        """
        if self.taken + branches > self.limit:
            free = self.limit - self.taken
            raise TooManyBranchesError(f"{branches} branches asked for, {free} of {self.limit} places are free")
        self.taken += branches

    def release(self, branches: int) -> None:
        """Give back what `acquire` took."""
        self.taken -= branches
