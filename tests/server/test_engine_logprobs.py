"""vLLM's log-probabilities processor, in whose place a branch has one that keeps a number for each token."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists

from server.engine import ConfidenceProcessor, keep_confidence_alone
from server.strategies.branches import token_confidence


class NoTokenizer:
    """A tokenizer that must not be used."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name}: nothing is to be decoded")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LogprobsProcessor, "from_new_request", LogprobsProcessor.from_new_request)  # to be restored
    keep_confidence_alone()


def new_processor(flat: bool, logprobs: int) -> LogprobsProcessor:
    params = SamplingParams(logprobs=logprobs, flat_logprobs=flat)
    request: Any = SimpleNamespace(sampling_params=params)
    tokenizer: Any = NoTokenizer() if flat else None
    return LogprobsProcessor.from_new_request(tokenizer=tokenizer, request=request)


def update(processor: LogprobsProcessor, rows: np.ndarray[Any, Any]) -> None:
    """Add a token for each row: the sampled token's log-probability, then those of the candidates, likeliest first."""
    ids = np.arange(rows.size).reshape(rows.shape)
    output: Any = SimpleNamespace(
        new_logprobs=LogprobsLists(ids, rows, np.full(len(rows), 999)),
        new_prompt_logprobs_tensors=None,
        prompt_token_id_logprobs=None,
    )
    processor.update_from_output(output)


@pytest.mark.parametrize("top", [2, 5])
def test_confidences_are_those_of_vllms_log_probabilities(top: int) -> None:
    """A row has more candidates than the branch needs if another request of the batch asked for more."""
    rows = -np.sort(np.random.default_rng(3).uniform(0, 9, (4, 8)), axis=1)
    rows[1, 2:] = -np.inf  # one candidate is left
    rows[2, 3:] = -np.inf
    own, vllms = new_processor(True, top), new_processor(False, top)
    for half in (rows[:1], rows[1:]):
        update(own, half)
        update(vllms, half[:, : top + 1])
    assert isinstance(own, ConfidenceProcessor)
    assert type(vllms) is LogprobsProcessor
    assert vllms.logprobs is not None
    expected = [token_confidence(candidates, top) for candidates in vllms.logprobs if candidates]
    kept: Any = own.logprobs
    assert kept == [pytest.approx(value, rel=1e-12) if value is not None else None for value in expected]
    assert expected.count(None) == 1
    assert own.cumulative_logprob == pytest.approx(vllms.cumulative_logprob)


def test_without_confidence_nothing_but_the_sum_is_kept() -> None:
    own = new_processor(True, 0)
    update(own, np.array([[-1.0, -0.5], [-2.0, -0.25]]))
    assert (own.logprobs, own.cumulative_logprob) == ([], -3.0)
