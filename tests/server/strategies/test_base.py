"""What strategies require of a request."""

import pytest

from em_sampler.validation import ParamsError
from tests.server.strategies.scripted import ScriptedEngine, ScriptedRun


def test_greedy_decoding_is_rejected_if_branches_would_be_equal() -> None:
    for kind in ("self_consistency", "deepconf"):
        with pytest.raises(ParamsError) as caught:
            ScriptedRun({"type": kind}, ScriptedEngine(temperature=0.0)).play()
        assert caught.value.field == "body.temperature"
