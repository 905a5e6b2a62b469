"""The V1 runner's processor: which request each row belongs to as rows move, and what is recorded of it."""

import random
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from em_sampler import EMInfParams
from em_sampler.params import RETURN_ADDRESS_KEY
from em_sampler.transforms.batch import BatchParams
from em_sampler.transforms.numba_cpu import NumbaTransform
from em_sampler.vllm_plugin.request import params_of
from tests.em_sampler.vllm_plugin.support import ROWS, VOCAB, asking, expected, logits_of, record, update, v1


def test_rows_follow_the_batch() -> None:
    swap, one_way = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL
    processor = v1()
    story = [
        (update([], [(0, asking(1)), (1, asking(0)), (2, asking(3)), (3, asking(4))], [], 4), [1, 0, 3, 4]),
        (None, [1, 0, 3, 4]),
        (update([], [], [(0, 2, swap)], 4), [3, 0, 1, 4]),
        (update([], [], [(0, 1, swap)], 4), [0, 3, 1, 4]),
        (update([1], [], [(3, 1, one_way)], 3), [0, 4, 1]),
        (update([1], [(1, asking(6))], [], 3), [0, 6, 1]),  # removed and taken again in one step
        (update([], [(2, asking(0))], [], 3), [0, 6, 0]),  # replaced by a request without a method
        (update([1], [], [(2, 1, one_way)], 2), [0, 0]),
        (update([], [(2, asking(2, temperature=0.0))], [], 3), [0, 0, 0]),
    ]
    for batch_update, steps in story:
        processor.update_state(batch_update)
        assert torch.equal(processor.apply(logits_of(len(steps))), expected(len(steps), steps))


def test_it_runs_before_the_temperature() -> None:
    assert v1().is_argmax_invariant() is False


Row = tuple[SamplingParams, list[int]]  # a request and its output tokens


def next_update(batch: list[Row | None], make: random.Random, numbers: list[int]) -> tuple[list[Row], BatchUpdate]:
    """Change a batch as vLLM may between two steps.

    Requests end, others take their rows, holes are filled from the end, and rows are swapped.
    """
    removed = [row for row in range(len(batch)) if make.random() < 0.3]
    replaced = [row for row in removed if make.random() < 0.3]  # vLLM reports such a row as added only
    for row in removed:
        batch[row] = None
    added, moved = [], []
    free = [*replaced, *(row for row in removed if row not in replaced), *range(len(batch), ROWS)]
    for row in free[: make.randint(len(replaced), len(free))]:
        kind = make.random()
        numbers.append(len(numbers))
        number = numbers[-1] if kind < 0.7 else None
        new = asking(make.randint(1, 3) if kind < 0.85 else 0, make.choice([0.0, 1.0]), number), []
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


def recorded_of(params: SamplingParams, output: list[int]) -> tuple[int | None, int]:
    """What has to be recorded of a row: the request's number, if it has a method that is to run, and the position."""
    number = (params.extra_args or {}).get(RETURN_ADDRESS_KEY, [None, None])[1] if params_of(params) else None
    return number, len(output)


@pytest.mark.parametrize("seed", range(8))
def test_each_row_s_request_and_position_are_recorded(seed: int) -> None:
    """Through a story of requests that come, go and move; at its end every slot is free again."""
    make, numbers, processor = random.Random(seed), [-1], v1()
    recorder, batch, seen = record(processor), [], set()
    for _ in range(60):
        batch, batch_update = next_update([*batch], make, numbers)
        for step in range(make.randint(1, 3)):
            processor.update_state(batch_update if step == 0 else None)
            recorder.last = None
            processor.apply(logits_of(len(batch)))
            wanted = [recorded_of(params, output) for params, output in batch]
            if any(number is not None for number, _ in wanted):
                assert recorder.last is not None
                assert [row if row[0] is not None else None for row in recorder.last] == [
                    row if row[0] is not None else None for row in wanted
                ]
                seen.update(wanted)
            else:
                assert recorder.last is None
            for _, output in batch:
                output.extend([7] * make.randint(1, 2))
        active = [params for params, _ in batch if params_of(params)]
        assert len(processor.free_slots) == ROWS - len(active)
    processor.update_state(update(list(range(len(batch))), [], [], 0))
    assert sorted(processor.free_slots) == list(range(ROWS))
    assert not recorder.assigned
    assert len({number for number, _ in seen}) > 30  # the story was one


def test_a_request_that_another_is_moved_onto_is_forgotten() -> None:
    processor = v1()
    recorder = record(processor)
    processor.update_state(update([], [(0, asking(1, number=10)), (1, asking(2, number=20))], [], 2))
    processor.update_state(update([], [], [(1, 0, MoveDirectionality.UNIDIRECTIONAL)], 1))
    assert list(recorder.assigned.values()) == [20]
    assert len(processor.free_slots) == ROWS - 1


def test_what_the_transform_measured_is_recorded() -> None:
    processor = v1()
    recorder = record(processor)
    processor.update_state(update([], [(0, asking(0)), (1, asking(3, number=5)), (2, asking(2))], [], 3))
    processor.apply(logits_of(3))
    assert recorder.output is not None
    assert recorder.last is not None and recorder.last[1] == (5, 0)
    alone = NumbaTransform(VOCAB)(
        logits_of(3), BatchParams.of([None, EMInfParams(steps=3, threshold=0.0), EMInfParams(steps=2, threshold=0.0)])
    )
    assert recorder.output.steps.tolist() == [0, 3, 2]
    assert torch.equal(recorder.output.entropy_before[1:], alone.entropy_before[1:])
    assert torch.equal(recorder.output.entropy_after[1:], alone.entropy_after[1:])


def test_the_rows_of_requests_that_ask_for_candidates_are_watched() -> None:
    processor = v1()
    recorder = record(processor)
    requests = [asking(0), asking(1, number=1, top=3), asking(2, number=2), asking(3, number=3, top=20)]
    processor.update_state(update([], list(enumerate(requests)), [], 4))
    processor.apply(logits_of(4))
    assert recorder.watch is not None and recorder.watch.rows.tolist() == [1, 3]
    assert torch.equal(recorder.watch.before, logits_of(4)[[1, 3]])
    processor.update_state(update([3], [], [(1, 0, MoveDirectionality.SWAP)], 3))
    processor.apply(logits_of(3))
    assert recorder.watch is not None and recorder.watch.rows.tolist() == [0]
    processor.update_state(update([0], [(0, asking(1, number=4))], [], 3))
    processor.apply(logits_of(3))
    assert recorder.watch is None


def test_rows_without_a_method_have_no_slot() -> None:
    processor = v1()
    recorded: list[list[int]] = []
    processor.recorder = SimpleNamespace(  # type: ignore[assignment]
        assign=lambda *_: None,
        start_step=lambda: SimpleNamespace(),
        finish_step=lambda _, slots, *__: recorded.append(slots.tolist()),
    )
    processor.update_state(update([], [(0, asking(0)), (1, asking(1)), (2, asking(0)), (3, asking(1))], [], 4))
    processor.apply(logits_of(4))
    processor.update_state(update([], [], [(0, 1, MoveDirectionality.SWAP)], 4))
    processor.apply(logits_of(4))
    before, after = recorded
    assert before[0] == before[2] == -1 and before[1] != before[3] and -1 not in (before[1], before[3])
    assert after == [before[1], -1, -1, before[3]]
