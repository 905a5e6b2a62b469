"""Cases have the parameters that they describe."""

import pytest

from benchmarks.transform.cases import TRUNCATIONS, Case
from benchmarks.transform.implementations import IMPLEMENTATIONS, supports
from benchmarks.transform.logits import language_model_logits
from em_sampler.params import MeasureParams


@pytest.mark.parametrize(("share", "active"), [(0.0, 0), (0.2, 3), (1.0, 16)])
def test_a_case_has_its_share_of_active_rows(share, active):
    params = Case(rows=16, vocab=200, share=share).params()
    assert sum(p.threshold == 0 for p in params) == active


def test_idle_rows_of_a_method_that_removes_tokens_are_measured():
    params = Case(rows=4, vocab=200, share=0.5, method="top_h").params()
    assert [isinstance(p, MeasureParams) for p in params] == [True, False, True, False]


@pytest.mark.parametrize("method", TRUNCATIONS)
@pytest.mark.parametrize("implementation", ["ours", "eager", "transformers"])
def test_a_method_that_removes_tokens_removes_some_of_every_row(method, implementation):
    case = Case(rows=3, vocab=5000, method=method)
    if not supports(implementation, case):
        pytest.skip(f"{implementation} has no {method}")
    logits = language_model_logits(3, 5000, origin="bfloat16")
    result = IMPLEMENTATIONS[implementation](case, logits.device)(logits)
    kept = getattr(result, "logits", result).isfinite().sum(1)
    assert ((kept >= 1) & (kept < 5000)).all()


@pytest.mark.parametrize("implementation", ["ours", "eager"])
def test_requests_have_the_temperature_of_the_case(implementation):
    """p_less keeps fewer tokens of a colder row."""
    kept = []
    for temperature in (1.0, 0.3):
        logits = language_model_logits(8, 5000, origin="bfloat16")
        case = Case(rows=8, vocab=5000, method="p_less", temperature=temperature)
        IMPLEMENTATIONS[implementation](case, logits.device)(logits)
        kept.append(logits.isfinite().sum())
    assert kept[1] < kept[0]
