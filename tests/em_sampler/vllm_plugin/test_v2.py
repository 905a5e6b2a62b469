"""The V2 runner's processor: which slot each row belongs to, and what is recorded of it."""

import pytest
import torch

from em_sampler.transforms.eager import EagerTransform
from em_sampler.vllm_plugin import v2 as module
from tests.em_sampler.vllm_plugin.support import asking, context, expected, logits_of, record, v2


def test_rows_follow_the_slots() -> None:
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


def test_each_row_s_position_is_recorded() -> None:
    processor = v2()
    recorder = record(processor)
    for slot, number in [(5, 50), (2, 20), (7, 70), (1, None)]:
        processor.add_request(slot, asking(1, number=number))
    processor.add_request(3, asking(0, number=30))  # has no method: nothing to record
    processor.apply_staged_writes()
    lengths = processor.req_states
    for slot, prompt, prefill in [(5, 10, 10), (2, 4, 4), (7, 6, 9), (1, 3, 3), (3, 2, 2)]:
        lengths.prompt_len.gpu[slot], lengths.prefill_len.gpu[slot] = prompt, prefill
    # Slot 5 samples its first token and three drafts, slot 2 its ninth, slots 1 and 3 are not recorded. Slot 7 comes
    # back from preemption: three tokens of its choice are prefilled again.
    rows, pos = [5, 5, 5, 5, 2, 7, 1, 3], [9, 10, 11, 12, 11, 7, 4, 4]
    processor.apply(logits_of(8), context([5, 2, 7, 1, 3], rows, pos))
    assert recorder.last is not None
    assert recorder.last[:6] == [(50, 0), (50, 1), (50, 2), (50, 3), (20, 8), (70, -1)]
    assert [number for number, _ in recorder.last[6:]] == [None, None]
    processor.apply(logits_of(2), context([7, 5], [7, 5], [8, 8]))
    assert recorder.last == [(70, 3), (50, -1)]  # slot 7's prefill is complete; slot 5's is one token short of it
    assert recorder.output is not None and recorder.output.steps.tolist() == [1, 1]


def test_the_rows_of_requests_that_ask_for_candidates_are_watched() -> None:
    processor = v2()
    recorder = record(processor)
    for slot, top in [(5, 3), (2, 0), (1, 20)]:
        processor.add_request(slot, asking(1, number=slot, top=top))
    processor.apply_staged_writes()
    processor.apply(logits_of(3), context([2, 1, 5], [2, 1, 5]))
    assert recorder.watch is not None and recorder.watch.rows.tolist() == [1, 2]
    assert torch.equal(recorder.watch.before, logits_of(3)[1:])
    processor.apply(logits_of(4), context([2, 5], [2, 2, 5, 5]))  # of drafts, only the device knows whose they are
    assert recorder.watch is not None and recorder.watch.rows.tolist() == [0, 1, 2, 3]
    processor.apply(logits_of(2), context([2], [2, 2]))
    assert recorder.watch is None
    processor.add_request(5, asking(1, number=50))
    processor.apply(logits_of(1), context([5], [5]))
    assert recorder.watch is None


def test_nothing_is_recorded_of_a_slot_s_last_request() -> None:
    processor = v2()
    recorder = record(processor)
    processor.add_request(4, asking(1, number=40))
    processor.add_request(5, asking(1, number=50))
    processor.add_request(4, asking(1))  # the same method, but nobody wants its stats
    assert recorder.assigned == {5: 50}
    processor.add_request(5, asking(0, number=51))
    assert recorder.assigned == {}
    processor.add_request(5, asking(2, temperature=0.0, number=52))  # greedy: not measured
    assert recorder.assigned == {}
    processor.add_request(5, asking(2, number=53))
    assert recorder.assigned == {5: 53}


def test_limits_are_found_for_the_eager_form_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(_: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(module, "host_limits", unwanted)
        fast = v2()
        fast.add_request(1, asking(3))
        fast.apply_staged_writes()
        assert torch.equal(fast.apply(logits_of(1), context([1], [1])), expected(1, [3]))
    monkeypatch.setattr(module, "build_transform", lambda _, *sizes: EagerTransform(*sizes))
    slow = v2()
    slow.add_request(1, asking(3))
    slow.apply_staged_writes()
    torch.testing.assert_close(slow.apply(logits_of(1), context([1], [1])), expected(1, [3]))


def test_a_new_request_reaches_the_device_s_table_only_before_a_step() -> None:
    """The copy on the device is another memory: a step in flight may still read it."""
    processor = v2()
    processor.add_request(1, asking(3))
    assert not processor.device_table.any()
    processor.apply_staged_writes()
    assert processor.device_table[1].any()
