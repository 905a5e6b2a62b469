"""The two runners' processors by themselves: who owns a row, and when there is nothing to do.

vLLM's own update and context classes; only its configuration is stood in for, by the sizes that are read from it.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState

from em_sampler import EMInfParams, transform
from em_sampler.params import Params
from em_sampler.plugin import EMInfLogitsProcessor
from em_sampler.vllm_v1 import V1Processor
from em_sampler.vllm_v2 import V2Processor

VOCAB, ROWS, CPU = 50, 8, torch.device("cpu")
CONFIG: Any = SimpleNamespace(
    model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB),
    scheduler_config=SimpleNamespace(max_num_seqs=ROWS),
    num_speculative_tokens=3,
)
STATES: Any = LogitsProcRequestState(CPU, ROWS, VOCAB, *[None] * 4)  # type: ignore[arg-type]


def asking(steps: int, temperature: float = 1.0) -> SamplingParams:
    extra_args = {"em_inf": {"steps": steps, "threshold": 0.0}} if steps else None
    return SamplingParams(temperature=temperature, extra_args=extra_args)


def logits_of(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows))


def expected(rows: int, steps: list[int]) -> torch.Tensor:
    params: list[Params | None] = [EMInfParams(steps=n, threshold=0.0) if n else None for n in steps]
    return transform(logits_of(rows), params).logits


def v1() -> V1Processor:
    processor = EMInfLogitsProcessor(CONFIG, CPU, False)
    assert isinstance(processor, V1Processor)
    return processor


def v2() -> V2Processor:
    processor = EMInfLogitsProcessor(CONFIG, STATES)
    assert isinstance(processor, V2Processor)
    return processor


def update(removed: list[int], added: list[tuple[int, SamplingParams]], moved: list[Any], size: int) -> BatchUpdate:
    return BatchUpdate(size, removed, [(row, params, None, []) for row, params in added], moved)


def test_v1_follows_the_batch() -> None:
    swap, one_way = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL
    processor = v1()
    story = [
        (update([], [(0, asking(1)), (1, asking(0)), (2, asking(3)), (3, asking(4))], [], 4), [1, 0, 3, 4]),
        (None, [1, 0, 3, 4]),
        (update([], [], [(0, 2, swap)], 4), [3, 0, 1, 4]),
        (update([], [], [(0, 1, swap)], 4), [0, 3, 1, 4]),
        (update([1], [], [(3, 1, one_way)], 3), [0, 4, 1]),
        (update([1], [(1, asking(6))], [], 3), [0, 6, 1]),  # removed and taken again in one step
        (update([], [(2, asking(0))], [], 3), [0, 6, 0]),  # replaced by a plain request
        (update([1], [], [(2, 1, one_way)], 2), [0, 0]),
        (update([], [(2, asking(2, temperature=0.0))], [], 3), [0, 0, 0]),
    ]
    for batch_update, steps in story:
        processor.update_state(batch_update)
        assert torch.equal(processor.apply(logits_of(len(steps))), expected(len(steps), steps))


def context(slots_of_requests: list[int], slots_of_rows: list[int]) -> LogitsContext:
    rows, requests = torch.tensor(slots_of_rows, dtype=torch.int32), np.array(slots_of_requests)
    unused: Any = None
    return LogitsContext(rows, unused, requests, unused, unused, unused, unused)


def test_v2_follows_the_slots() -> None:
    processor = v2()
    for slot, steps in [(5, 1), (2, 0), (7, 3)]:
        assert processor.add_request(slot, asking(steps)) is bool(steps)
    processor.apply_staged_writes()
    assert torch.equal(processor.apply(logits_of(3), context([7, 2, 5], [7, 2, 5])), expected(3, [3, 0, 1]))
    # Speculative decoding: a row for each draft token.
    rows = [5, 5, 5, 2, 2, 7]
    assert torch.equal(processor.apply(logits_of(6), context([5, 2, 7], rows)), expected(6, [1, 1, 1, 0, 0, 3]))
    # Slots are recycled without notice.
    assert processor.add_request(7, asking(0)) is False
    assert processor.add_request(2, asking(9)) is True
    assert processor.add_request(5, asking(9, temperature=0.0)) is False
    processor.apply_staged_writes()
    assert torch.equal(processor.apply(logits_of(3), context([7, 2, 5], [7, 2, 5])), expected(3, [0, 9, 0]))


def test_nothing_is_done_without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No method in the batch, or greedy requests only: the logits are not looked at."""
    first, second = v1(), v2()

    def fail(*_: object) -> None:
        raise AssertionError("the transform was called")

    monkeypatch.setattr(first, "transform", fail)
    monkeypatch.setattr(second, "transform", fail)
    untouched: Any = object()
    plain, greedy = asking(0), asking(5, temperature=0.0)
    first.update_state(update([], [(0, plain), (1, greedy)], [], 2))
    assert first.apply(untouched) is untouched
    second.add_request(0, plain)
    second.add_request(1, greedy)
    second.add_request(2, asking(5))  # in a slot, but not in this step's batch
    second.apply_staged_writes()
    assert second.apply(untouched, context([0, 1], [0, 1])) is untouched


def test_it_runs_before_the_temperature() -> None:
    assert v1().is_argmax_invariant() is False


@pytest.mark.parametrize("extra_args", [{"em_inf_threshold": 0.2}, {"em_inf": True}, {"em_inf_steps": 4}])
def test_the_cap_holds_for_defaults_too(monkeypatch: pytest.MonkeyPatch, extra_args: dict[str, Any]) -> None:
    """The worker would use the default of 5 steps: on a route that does not lower it, the request is refused."""
    sampling_params = SamplingParams(extra_args=extra_args)
    EMInfLogitsProcessor.validate_params(sampling_params)
    monkeypatch.setattr(EMInfLogitsProcessor, "max_steps", 3)
    with pytest.raises(ValueError, match=r"em_inf\.steps: .*from 0 up to 3"):
        EMInfLogitsProcessor.validate_params(sampling_params)
    EMInfLogitsProcessor.validate_params(SamplingParams(extra_args={"em_inf_steps": 3}))
