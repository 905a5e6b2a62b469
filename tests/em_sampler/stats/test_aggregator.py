"""Who gets which stats, when a token's stats are final, and that every token's last stats arrive once."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from em_sampler.params import RETURN_ADDRESS_KEY
from em_sampler.stats.aggregator import FINAL_AFTER_TOKENS, ReturnAddress, SlotTable
from em_sampler.stats.wire import (
    SUMMED_FIELDS,
    TOKEN_DTYPE,
    TOTALS_DTYPE,
    VALUES_DTYPE,
    StructuredArray,
    add_tokens,
)
from server.stats.collector import ChoiceStats
from tests.em_sampler.stats.support import ONE, TokenStats, at, read, return_address

NAN = math.nan

# What a request carries


def test_a_return_address_is_read_as_the_server_wrote_it() -> None:
    written = ReturnAddress(ONE, 7, 2, True)
    assert written.to_extra_args() == {RETURN_ADDRESS_KEY: [ONE, 7, 2, True]}
    assert ReturnAddress.from_extra_args(written.to_extra_args() | {"em_inf": {}}) == written
    assert ReturnAddress.from_extra_args({RETURN_ADDRESS_KEY: (ONE, 0, 0, False)}) == ReturnAddress(ONE, 0, 0, False)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        7,
        ONE,
        [],
        {"socket_name": ONE},
        [ONE],
        [ONE, 7, 2],
        [ONE, 7, 2, True, True],
        [7, 7, 2, True],
        [ONE, "7", 2, True],
        [ONE, -1, 2, True],
        [ONE, 2**64, 2, True],
        [ONE, 7, -1, True],
        [ONE, 7, 2**32, True],
        [ONE, 7.0, 2, True],
        [ONE, 7, None, True],
        [ONE, 7, 2, 1],
        [ONE, 7, 2, "true"],
        [ONE[1:], 7, 2, True],
        [ONE + "0", 7, 2, True],
        [ONE + "\n", 7, 2, True],
        [ONE.upper(), 7, 2, True],
        ["../../../../../../../tmp/a-socket", 7, 2, True],
        ["", 7, 2, True],
    ],
)
def test_a_return_address_that_the_server_cannot_have_written_is_none(value: object) -> None:
    assert ReturnAddress.from_extra_args({RETURN_ADDRESS_KEY: value}) is None


@pytest.mark.parametrize("extra_args", [None, {}, {"em_inf": {"stats": "tokens"}}])
def test_a_request_without_a_return_address_has_none(extra_args: dict[str, Any] | None) -> None:
    assert ReturnAddress.from_extra_args(extra_args) is None


# What is kept, and what is sent


def slots_of(*addresses: ReturnAddress | None) -> SlotTable:
    slots = SlotTable(len(addresses))
    for slot, address in enumerate(addresses):
        slots.assign(slot, address)
    return slots


def add(slots: SlotTable, *tokens: tuple[int, int, TokenStats]) -> None:
    """One step's tokens, each (slot, position, stats)."""
    slot_of_row, positions, stats = zip(*tokens, strict=True)
    *floats, steps = (np.array(values) for values in zip(*stats, strict=True))
    entropies = (values.astype(np.float32).view(np.int32) for values in floats)
    slots.add(np.stack([np.array(slot_of_row), np.array(positions), *entropies, steps]).astype(np.int32))


def sent(slots: SlotTable) -> tuple[list[tuple[Any, ...]], StructuredArray]:
    """(tokens, totals) that are sent to the API server next."""
    tokens, totals, _ = slots.pending[ONE].take()
    return read(np.concatenate([np.zeros(0, TOKEN_DTYPE), *tokens])), np.concatenate(
        [np.zeros(0, TOTALS_DTYPE), *totals]
    )


def folded(slots: SlotTable) -> tuple[list[tuple[Any, ...]], StructuredArray]:
    slots.fold()
    return sent(slots)


def tokens_of(request_number: int, positions: Iterable[int], choice: int = 0) -> list[tuple[Any, ...]]:
    return [(request_number, choice, position, *at(position)) for position in positions]


def test_a_slot_that_sends_every_token_keeps_none() -> None:
    slots = slots_of(None, return_address(7, per_token=True, choice=2), None)
    add(slots, (1, 0, (1.5, 0.5, 2.5, 3)), (0, 4, at(4)), (1, 1, at(1)), (1, -1, at(9)), (-1, 3, at(3)))
    assert not slots.has_pending()
    assert sent(slots)[0] == [(7, 2, 0, 1.5, 0.5, 2.5, 3), (7, 2, 1, *at(1))]


def test_a_token_that_was_not_measured_is_sent_as_such() -> None:
    slots = slots_of(return_address(7, per_token=True))
    add(slots, (0, 0, (NAN, NAN, NAN, 0)))
    assert repr(sent(slots)[0]) == "[(7, 0, 0, nan, nan, nan, 0)]"


def test_tokens_for_totals_wait_until_their_request_is_idle() -> None:
    slots = slots_of(None, None, return_address(7, choice=1))
    for position in range(3):
        add(slots, (2, position, at(position)), (2, -1, at(50)))
    assert sent(slots)[0] == []
    assert slots.has_pending()
    assert folded(slots)[0] == []  # there were new ones
    tokens, totals = folded(slots)
    assert tokens == tokens_of(7, range(3), choice=1)
    assert len(totals) == 0
    assert not slots.has_pending()


def test_the_last_stats_of_a_position_count() -> None:
    slots = slots_of(return_address(7))
    # A draft, rejected from its second token on.
    add(slots, *((0, position, (9.0, 9.0, 9.0, 9)) for position in range(4)))
    add(slots, *((0, position, at(position)) for position in range(1, 3)))
    folded(slots)
    add(slots, (0, 3, at(3)))
    folded(slots)
    assert folded(slots)[0] == [(7, 0, 0, 9.0, 9.0, 9.0, 9), *tokens_of(7, range(1, 4))]


def test_a_token_is_final_a_fixed_number_of_tokens_later() -> None:
    slots = slots_of(return_address(7), return_address(7, choice=1))
    for position in range(FINAL_AFTER_TOKENS):
        add(slots, (0, position, at(position)), (1, position, at(position)))
    assert len(folded(slots)[1]) == 0
    for position in range(FINAL_AFTER_TOKENS, FINAL_AFTER_TOKENS + 3):
        add(slots, (0, position, at(position)))
    _, totals = folded(slots)
    fields = ["request_number", "choice", "first", "end", "tokens", "steps"]
    assert totals[fields].tolist() == [(7, 0, 0, 3, 3, 0 + 1 + 2)]
    assert totals["before_sum"][0] == 1.0 + 2.0 + 3.0
    assert folded(slots)[0] == tokens_of(7, range(3, FINAL_AFTER_TOKENS + 3))  # the other choice was idle before


def test_totals_are_of_the_tokens_that_became_final_since() -> None:
    slots = slots_of(return_address(7))
    for position in range(FINAL_AFTER_TOKENS + 3):
        add(slots, (0, position, at(position)))
    folded(slots)
    for position in range(FINAL_AFTER_TOKENS + 3, FINAL_AFTER_TOKENS + 5):
        add(slots, (0, position, at(position)))
    _, totals = folded(slots)
    assert totals[["request_number", "first", "end", "tokens", "steps"]].tolist() == [(7, 3, 5, 2, 3 + 4)]
    assert folded(slots)[0] == tokens_of(7, range(5, FINAL_AFTER_TOKENS + 5))


def test_pending_tokens_belong_to_their_request_whoever_has_the_slot_now() -> None:
    slots = slots_of(return_address(7))
    add(slots, (0, 0, at(0)))
    slots.assign(0, return_address(8, choice=3))
    add(slots, (0, 0, at(0)))
    slots.assign(0, None)
    add(slots, (0, 1, at(1)))
    folded(slots)
    assert folded(slots)[0] == [*tokens_of(7, [0]), *tokens_of(8, [0], choice=3)]


class Sampled:
    """A request as the engine has it: how long its choice is, and what was last sampled for each position."""

    def __init__(self, address: ReturnAddress) -> None:
        self.address = address
        self.length = 0
        self.last: dict[int, TokenStats] = {}


class Engine:
    """Slots with requests, and an API server that receives what is sent."""

    def __init__(self, slots: int) -> None:
        self.slots = SlotTable(slots)
        self.in_slot: list[Sampled | None] = [None] * slots
        self.requests: list[Sampled] = []
        self.received: dict[tuple[int, int], ChoiceStats] = {}  # by request number and choice
        self.count = 0

    def step(self, slot: int, drafts: int, accepted: int) -> list[tuple[int, int, TokenStats]]:
        """One step's rows of a slot: `drafts` tokens beside the next, of which `accepted` are taken."""
        request = self.in_slot[slot]
        if request is None:
            return [(slot, self.count % 5, self.stats())]  # of a request without a return address
        rows = [(slot, request.length + i, self.stats()) for i in range(drafts + 1)]
        request.last |= {position: stats for _, position, stats in rows}
        request.length += 1 + min(accepted, drafts)
        return rows

    def stats(self) -> TokenStats:
        """Unlike any other; sums of such entropies are exact."""
        self.count += 1
        return (
            (NAN, NAN, NAN, 0)
            if self.count % 11 == 0
            else (self.count / 64, self.count % 7 / 64, self.count % 5 / 64, self.count % 4)
        )

    def deliver(self, fold: bool) -> None:
        """As `server.stats.collector.StatsCollector.receive` takes a message in."""
        if fold:
            self.slots.fold()
        if not self.slots.pending:
            return
        tokens, totals = sent(self.slots)
        for row in totals:
            self.received.setdefault((int(row["request_number"]), int(row["choice"])), ChoiceStats()).add_totals(row)
        for number, choice, position, *stats in tokens:
            self.received.setdefault((number, choice), ChoiceStats()).by_position[position] = tuple(stats)

    def assign(self, slot: int, request: Sampled | None) -> None:
        self.slots.assign(slot, request and request.address)
        self.in_slot[slot] = request
        if request and request not in self.requests:
            self.requests.append(request)

    def move(self, source: int, target: int, again: int) -> None:
        """Preempt a request and resume it elsewhere, the last of its tokens sampled again."""
        request = self.in_slot[source]
        self.assign(source, None)
        if request:
            request.length = max(0, request.length - again)
        self.assign(target, request)


SLOTS = 3
slots = st.integers(0, SLOTS - 1)
few = st.integers(0, 3)
actions = st.one_of(
    st.tuples(st.just("step"), st.lists(st.tuples(st.integers(0, 3), few), min_size=SLOTS, max_size=SLOTS)),
    st.tuples(st.just("run"), st.tuples(st.integers(1, 3 * FINAL_AFTER_TOKENS), few, few)),
    st.tuples(st.just("send"), st.booleans()),
    st.tuples(st.just("assign"), st.tuples(slots, st.booleans())),
    st.tuples(st.just("leave"), slots),
    st.tuples(st.just("move"), st.tuples(slots, slots, few)),
)


@settings(max_examples=150)
@given(st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS), st.lists(actions, max_size=25))
def test_a_server_gets_the_last_stats_of_every_position_once(kinds: list[bool], story: list[Any]) -> None:
    engine, number = Engine(SLOTS), 0
    for slot, per_token in enumerate(kinds):
        engine.assign(slot, Sampled(return_address(number, per_token, choice=number % 2)))
        number += 1
    for action, how in story:
        if action == "step":
            rows = [row for slot, (drafts, accepted) in enumerate(how) for row in engine.step(slot, drafts, accepted)]
            add(engine.slots, *rows[::-1], (0, -1, (5.0, 5.0, 5.0, 5)))  # and a row in prefill, which has no position
        elif action == "run":
            for _ in range(how[0]):
                add(engine.slots, *(row for slot in range(SLOTS) for row in engine.step(slot, how[1], how[2])))
        elif action == "send":
            engine.deliver(fold=how)
        elif action == "assign":
            engine.assign(how[0], Sampled(return_address(number, how[1], choice=number % 2)))
            number += 1
        elif action == "leave":
            engine.assign(how, None)
        else:
            engine.move(*how)
    engine.deliver(fold=True)
    engine.deliver(fold=True)
    for request in engine.requests:
        sampled = [request.last[position] for position in range(request.length)]
        choice = engine.received.get((request.address.request_number, request.address.choice), ChoiceStats())
        choice.tokens = request.length
        assert choice.missing() == 0
        if request.address.per_token:
            known = [choice.by_position[position] for position in range(request.length)]
            assert repr(known) == repr(sampled)  # NaN is not equal to itself, but its text is
        choice.finalize()
        expected = np.zeros(1, dtype=TOTALS_DTYPE)
        values, positions = np.array(sampled, dtype=VALUES_DTYPE), np.arange(len(sampled))
        add_tokens(expected, np.zeros(len(sampled), dtype=np.intp), values, positions)
        for name in (*SUMMED_FIELDS, "highest", "highest_position"):
            assert choice.totals[name].tolist() == expected[name].tolist(), name
