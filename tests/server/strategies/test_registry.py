"""Reading a request's `strategy`: errors that name the field, and the operator's limit on branches."""

from typing import Any

import pytest

from em_sampler.validation import ParamsError
from server.strategies.registry import describe_strategies, parse_strategy
from server.strategies.self_consistency import SelfConsistency


@pytest.mark.parametrize(
    ("answer", "field", "says"),
    [
        ("boxed", "strategy.answer", "must be an object"),
        ({"type": "best"}, "strategy.answer.type", "one of boxed, regex, last_number, text"),
        ({"type": "regex"}, "strategy.answer", "needs a `pattern`"),
        ({"pattern": "x"}, "strategy.answer", "for type regex"),
        ({"type": "regex", "pattern": "("}, "strategy.answer", "RE2"),
        ({"type": "regex", "pattern": r"(?=a)"}, "strategy.answer", "RE2"),
        ({"type": "regex", "pattern": "(a{1000}){1000}"}, "strategy.answer", "RE2"),
        ({"type": "regex", "pattern": "[" + "a" * 999}, "strategy.answer", "RE2"),
        ({"type": "regex", "pattern": "a" * 1001}, "strategy.answer.pattern", "1 to 1000 characters"),
        ({"type": "regex", "pattern": ""}, "strategy.answer.pattern", 'got "" (empty text); must be text of 1 to 1000'),
        ({"kind": "boxed"}, "strategy.answer.kind", "unknown field"),
    ],
)
def test_an_error_in_answer_names_the_field_and_what_is_wrong(answer: Any, field: str, says: str) -> None:
    with pytest.raises(ParamsError) as caught:
        parse_strategy({"type": "self_consistency", "answer": answer})
    assert caught.value.field == field
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("value", "field", "says"),
    [
        ("deepconf", "strategy", "must be an object"),
        ({}, "strategy.type", "one of self_consistency, refinement, deepconf"),
        ({"type": ["deepconf"]}, "strategy.type", "one of self_consistency, refinement, deepconf"),
        ({"type": "refinement", "rounds": 1}, "strategy.rounds", "from 2 up to 6"),
        ({"type": "refinement", "rounds": 7.0}, "strategy.rounds", "got 7; this server allows"),
        ({"type": "refinement", "rounds": 2.5}, "strategy.rounds", "got 2.5; must be an integer"),
        ({"type": "refinement", "rounds": 7}, "strategy.rounds", "from 2 up to 6"),
        ({"type": "deepconf", "n": True}, "strategy.n", "true"),
        ({"type": "deepconf", "n": 4, "warmup": 4}, "strategy", "warmup 4 must be below n 4"),
        ({"type": "self_consistency", "confidence": 0.9}, "strategy", "early_stop"),
    ],
)
def test_an_error_in_a_strategy_names_the_field_and_what_is_allowed(value: Any, field: str, says: str) -> None:
    with pytest.raises(ParamsError) as caught:
        parse_strategy(value, max_branches=6)
    assert caught.value.field == field
    assert says in str(caught.value)


def test_a_count_may_be_a_float_that_is_a_whole_number() -> None:
    strategy = parse_strategy({"type": "self_consistency", "n": 4.0}, max_branches=4)
    assert strategy
    assert strategy.max_branches == 4


@pytest.mark.parametrize("within", [False, True])
def test_unknown_names_end_the_check_before_pydantic_sees_them(within: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SelfConsistency, "model_validate", lambda settings: pytest.fail("pydantic was called"))
    unknown = {f"x{number}": number for number in range(1000)}
    fields = {"answer": unknown} if within else unknown
    with pytest.raises(ParamsError, match=r"strategy(\.answer)?\.x0: unknown field"):
        parse_strategy({"type": "self_consistency", **fields})


def test_a_default_is_lowered_to_the_operators_limit() -> None:
    strategy = parse_strategy({"type": "self_consistency"}, max_branches=3)
    assert strategy
    assert strategy.max_branches == 3
    assert parse_strategy(None) is None
    described = describe_strategies(max_branches=3)
    assert {name: schema["properties"].get("n", {}).get("maximum") for name, schema in described.items()} == {
        "self_consistency": 3,
        "refinement": None,
        "deepconf": 3,
    }
    assert described["refinement"]["properties"]["rounds"]["maximum"] == 3
