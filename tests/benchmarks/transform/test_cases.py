"""Cases have the parameters that they describe."""

import pytest

from benchmarks.transform.cases import Case


@pytest.mark.parametrize(("share", "active"), [(0.0, 0), (0.2, 3), (1.0, 16)])
def test_a_case_has_its_share_of_active_rows(share, active):
    params = Case(rows=16, vocab=200, share=share).params()
    assert sum(p.threshold == 0 for p in params) == active
