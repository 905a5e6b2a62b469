"""The branch limit: exact at its edge, and unchanged by a request that does not fit."""

import pytest

from server.admission import BranchLimit, TooManyBranchesError


def test_branches_up_to_the_limit_are_reserved_and_one_more_is_not() -> None:
    limit = BranchLimit(5)
    limit.acquire(3)
    limit.acquire(2)
    with pytest.raises(TooManyBranchesError, match="1 places asked for, 0 of 5 are free"):
        limit.acquire(1)
    limit.release(2)
    with pytest.raises(TooManyBranchesError, match="3 places asked for, 2 of 5 are free"):
        limit.acquire(3)
    assert limit.taken == 3
    limit.acquire(2)
    assert limit.taken == 5
