"""The two runners' processors by themselves: who owns a row, what is reported of it, and when there is nothing to do.

vLLM's own update and context classes; only its configuration is stood in for, by the sizes that are read from it.
"""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState

from em_sampler import EMInfParams
from em_sampler.params import RETURN_ADDRESS_KEY, Params
from em_sampler.stats.recorder import ReturnAddress
from em_sampler.stats.transport import SOCKET_DIR_ENV
from em_sampler.transforms.batch import BatchParams, TransformOutput
from em_sampler.transforms.numba_cpu import NumbaTransform
from em_sampler.vllm_plugin.processor import EMInfLogitsProcessor
from em_sampler.vllm_plugin.request import params_of
from em_sampler.vllm_plugin.v1 import V1Processor
from em_sampler.vllm_plugin.v2 import V2Processor

VOCAB, ROWS, CPU = 50, 8, torch.device("cpu")
CHANNEL = "0" * 32 + ".0"


def config(rank: int = 0, tensor_parallel_size: int = 1) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB),
        scheduler_config=SimpleNamespace(max_num_seqs=ROWS),
        parallel_config=SimpleNamespace(rank=rank, tensor_parallel_size=tensor_parallel_size),
        num_speculative_tokens=3,
    )


def states() -> Any:
    lengths = [SimpleNamespace(gpu=torch.zeros(ROWS, dtype=torch.int32)) for _ in range(2)]
    unused: Any = None
    return LogitsProcRequestState(CPU, ROWS, VOCAB, unused, *lengths, unused)  # type: ignore[arg-type]


def asking(steps: int, temperature: float = 1.0, report: int | None = None) -> SamplingParams:
    extra_args: dict[str, Any] = {"em_inf": {"steps": steps, "threshold": 0.0}} if steps else {}
    if report is not None:
        extra_args[RETURN_ADDRESS_KEY] = [CHANNEL, report, 0, True]
    return SamplingParams(temperature=temperature, extra_args=extra_args or None)


def logits_of(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows))


def expected(rows: int, steps: list[int]) -> torch.Tensor:
    params: list[Params | None] = [EMInfParams(steps=n, threshold=0.0) if n else None for n in steps]
    return NumbaTransform(VOCAB)(logits_of(rows), BatchParams.of(params)).logits


def v1() -> V1Processor:
    processor = EMInfLogitsProcessor(config(), CPU, False)
    assert isinstance(processor, V1Processor)
    return processor


def v2() -> V2Processor:
    processor = EMInfLogitsProcessor(config(), states())
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


def context(
    slots_of_requests: list[int], slots_of_rows: list[int], positions: list[int] | None = None
) -> LogitsContext:
    rows, requests = torch.tensor(slots_of_rows, dtype=torch.int32), np.array(slots_of_requests)
    pos = torch.tensor(positions or [0] * len(slots_of_rows))
    unused: Any = None
    return LogitsContext(rows, unused, requests, unused, unused, pos, unused)


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


class Reported:
    """In the place of `Telemetry`: remembers what it was told of the last step, by request."""

    def __init__(self) -> None:
        self.bound: dict[int, int] = {}  # slot -> request
        self.last: list[tuple[int | None, int]] | None = None  # (request, position) of each row
        self.done: TransformOutput | None = None

    def bind(self, slot: int, report: ReturnAddress | None) -> None:
        self.bound.pop(slot, None)
        if report:
            assert report.request not in self.bound.values()
            self.bound[slot] = report.request

    def begin(self) -> "Reported | None":
        self.last = None
        return self if self.bound else None

    def end(self, stage: "Reported", slots: torch.Tensor, positions: torch.Tensor, done: TransformOutput) -> None:
        assert stage is self
        assert slots.dtype == positions.dtype == torch.int32
        self.last = [(self.bound.get(slot), at) for slot, at in zip(slots.tolist(), positions.tolist(), strict=True)]
        self.done = done


def observed(processor: V1Processor | V2Processor) -> Reported:
    processor.telemetry = reported = Reported()  # type: ignore[assignment]
    return reported


Row = tuple[SamplingParams, list[int]]


def next_update(batch: list[Row | None], make: random.Random, numbers: list[int]) -> tuple[list[Row], BatchUpdate]:
    """What vLLM may do to a batch between two steps: requests end, others come in their place, holes are filled from
    the end, and rows are swapped."""
    removed = [row for row in range(len(batch)) if make.random() < 0.3]
    replaced = [row for row in removed if make.random() < 0.3]  # vLLM reports such a row as added only
    for row in removed:
        batch[row] = None
    added, moved = [], []
    places = [*replaced, *(row for row in removed if row not in replaced), *range(len(batch), ROWS)]
    for row in places[: make.randint(len(replaced), len(places))]:
        kind = make.random()
        numbers.append(len(numbers))
        report = numbers[-1] if kind < 0.7 else None
        new = asking(make.randint(1, 3) if kind < 0.85 else 0, make.choice([0.0, 1.0]), report), []
        batch.extend([None] * (row + 1 - len(batch)))
        batch[row] = new
        added.append((row, new[0], None, new[1]))
    while None in batch:
        hole, last = batch.index(None), batch.pop()
        if last is not None:
            batch[hole] = last
            moved.append((len(batch), hole, MoveDirectionality.UNIDIRECTIONAL))
    for _ in range(make.randint(0, 2) if len(batch) > 1 else 0):
        one, other = make.sample(range(len(batch)), 2)
        batch[one], batch[other] = batch[other], batch[one]
        moved.append((one, other, MoveDirectionality.SWAP))
    rows = [row for row in batch if row is not None]
    return rows, BatchUpdate(len(rows), [row for row in removed if row not in replaced], added, moved)


@pytest.mark.parametrize("seed", range(8))
def test_v1_reports_each_row_s_request_and_position(seed: int) -> None:
    """Through a story of requests that come, go and move; at its end every slot is free again."""
    make, numbers, processor = random.Random(seed), [-1], v1()
    reported, batch, seen = observed(processor), [], set()
    for _ in range(60):
        batch, batch_update = next_update([*batch], make, numbers)
        for step in range(make.randint(1, 3)):
            processor.update_state(batch_update if step == 0 else None)
            reported.last = None
            processor.apply(logits_of(len(batch)))
            wanted = [report_of(params, output) for params, output in batch]
            if any(request is not None for request, _ in wanted):
                assert reported.last is not None
                assert [row if row[0] is not None else None for row in reported.last] == [
                    row if row[0] is not None else None for row in wanted
                ]
                seen.update(wanted)
            else:
                assert reported.last is None
            for _, output in batch:
                output.extend([7] * make.randint(1, 2))
        own = [params for params, _ in batch if params_of(params)]
        assert len(processor.free_slots) == ROWS - len(own)
    processor.update_state(update(list(range(len(batch))), [], [], 0))
    assert sorted(processor.free_slots) == list(range(ROWS))
    assert not reported.bound
    assert len({request for request, _ in seen}) > 30  # the story was one


def test_v1_forgets_a_request_that_another_is_moved_onto() -> None:
    processor = v1()
    reported = observed(processor)
    processor.update_state(update([], [(0, asking(1, report=10)), (1, asking(2, report=20))], [], 2))
    processor.update_state(update([], [], [(1, 0, MoveDirectionality.UNIDIRECTIONAL)], 1))
    assert list(reported.bound.values()) == [20]
    assert len(processor.free_slots) == ROWS - 1


def report_of(params: SamplingParams, output: list[int]) -> tuple[int | None, int]:
    """What has to be reported of a row: the request's number, if it has a method that is to run, and the position."""
    number = (params.extra_args or {}).get(RETURN_ADDRESS_KEY, [None, None])[1] if params_of(params) else None
    return number, len(output)


def test_v1_reports_what_the_transform_measured() -> None:
    processor = v1()
    reported = observed(processor)
    processor.update_state(update([], [(0, asking(0)), (1, asking(3, report=5)), (2, asking(2))], [], 3))
    processor.apply(logits_of(3))
    assert reported.done is not None
    assert reported.last is not None and reported.last[1] == (5, 0)
    alone = NumbaTransform(VOCAB)(
        logits_of(3), BatchParams.of([None, EMInfParams(steps=3, threshold=0.0), EMInfParams(steps=2, threshold=0.0)])
    )
    assert reported.done.steps.tolist() == [0, 3, 2]
    assert torch.equal(reported.done.entropy_before[1:], alone.entropy_before[1:])
    assert torch.equal(reported.done.entropy_after[1:], alone.entropy_after[1:])


def test_v1_has_no_slot_for_rows_without_a_method() -> None:
    processor = v1()
    slots: list[list[int]] = []
    processor.telemetry = SimpleNamespace(  # type: ignore[assignment]
        bind=lambda *_: None, begin=lambda: True, end=lambda _, where, *__: slots.append(where.tolist())
    )
    processor.update_state(update([], [(0, asking(0)), (1, asking(1)), (2, asking(0)), (3, asking(1))], [], 4))
    processor.apply(logits_of(4))
    processor.update_state(update([], [], [(0, 1, MoveDirectionality.SWAP)], 4))
    processor.apply(logits_of(4))
    before, after = slots
    assert before[0] == before[2] == -1 and before[1] != before[3] and -1 not in (before[1], before[3])
    assert after == [before[1], -1, -1, before[3]]


def test_v2_reports_the_place_in_the_reply() -> None:
    processor = v2()
    reported = observed(processor)
    for slot, report in [(5, 50), (2, 20), (7, 70), (1, None)]:
        processor.add_request(slot, asking(1, report=report))
    processor.add_request(3, asking(0, report=30))  # has no method: nothing to report
    processor.apply_staged_writes()
    lengths = processor.req_states
    for slot, prompt, prefill in [(5, 10, 10), (2, 4, 4), (7, 6, 9), (1, 3, 3), (3, 2, 2)]:
        lengths.prompt_len.gpu[slot], lengths.prefill_len.gpu[slot] = prompt, prefill
    # Slot 5 samples its first token and three drafts, slot 2 its ninth, slots 1 and 3 are not reported. Slot 7 comes
    # back from preemption with three tokens of its reply to be fed again.
    rows, pos = [5, 5, 5, 5, 2, 7, 1, 3], [9, 10, 11, 12, 11, 7, 4, 4]
    processor.apply(logits_of(8), context([5, 2, 7, 1, 3], rows, pos))
    assert reported.last is not None
    assert reported.last[:6] == [(50, 0), (50, 1), (50, 2), (50, 3), (20, 8), (70, -1)]
    assert [request for request, _ in reported.last[6:]] == [None, None]
    processor.apply(logits_of(2), context([7, 5], [7, 5], [8, 8]))
    assert reported.last == [(70, 3), (50, -1)]  # its prefill is complete; slot 5's is one token short of it
    assert reported.done is not None and reported.done.steps.tolist() == [1, 1]


def test_v2_reports_nothing_of_a_slot_s_last_request() -> None:
    processor = v2()
    reported = observed(processor)
    processor.add_request(4, asking(1, report=40))
    processor.add_request(5, asking(1, report=50))
    processor.add_request(4, asking(1))  # the same method, but nobody wants to know
    assert reported.bound == {5: 50}
    processor.add_request(5, asking(0, report=51))
    assert reported.bound == {}
    processor.add_request(5, asking(2, temperature=0.0, report=52))  # greedy: not looked at
    assert reported.bound == {}
    processor.add_request(5, asking(2, report=53))
    assert reported.bound == {5: 53}


@pytest.mark.parametrize("make", ["v1", "v2"])
@pytest.mark.parametrize(
    ("rank", "size", "reports"), [(0, 1, True), (0, 2, True), (1, 2, False), (2, 2, True), (3, 2, False), (3, 4, False)]
)
def test_the_first_rank_of_a_group_reports_for_all(
    make: str, rank: int, size: int, reports: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank samples the same tokens; `rank` counts over the pipeline's stages too."""
    monkeypatch.setenv(SOCKET_DIR_ENV, str(tmp_path))
    asked = asking(1, report=1)
    if make == "v1":
        processor = EMInfLogitsProcessor(config(rank, size), CPU, False)
        processor.update_state(update([], [(0, asked)], [], 1))
    else:
        processor = EMInfLogitsProcessor(config(rank, size), states())
        processor.add_request(0, asked)
    assert (processor.telemetry.begin() is not None) is reports
