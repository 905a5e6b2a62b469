"""What strategies require of a request."""

import pytest

from em_sampler.validation import ParamsError
from tests.server.strategies.scripted import Script, ScriptedEngine, ScriptedRun


@pytest.mark.parametrize("kind", ["self_consistency", "deepconf"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.0), ("temperature", 9e-6), ("top_k", 1), ("top_p", 1e-9), ("top_p", 1e-6), ("min_p", 1.0)],
)
def test_decoding_by_which_all_branches_would_be_equal_is_rejected(kind: str, field: str, value: float) -> None:
    with pytest.raises(ParamsError) as caught:
        ScriptedRun({"type": kind}, ScriptedEngine(**{field: value})).play()
    assert caught.value.field == f"body.{field}"
    assert f"got {value:g}; {kind} needs" in caught.value.problem


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 1e-5), ("top_k", 2), ("top_k", -1), ("top_p", 1e-5), ("min_p", 0.99)]
)
def test_decoding_by_which_branches_may_differ_is_accepted(field: str, value: float) -> None:
    run = ScriptedRun({"type": "self_consistency", "n": 2}, ScriptedEngine(*[Script()] * 2, **{field: value}))
    assert run.play().summary["completed"] == 2


def test_rounds_of_refinement_differ_by_their_prompts() -> None:
    run = ScriptedRun({"type": "refinement", "rounds": 2}, ScriptedEngine(*[Script()] * 2, top_k=1, temperature=0.0))
    assert run.play().summary["completed"] == 2
