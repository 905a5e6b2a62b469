"""The fields of a request: which settings it gets, what it passes to the sampler, and what cannot be combined."""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from em_sampler.params import MAX_STEPS, EMInfParams, parse_params
from em_sampler.validation import ParamsError
from server.protocol import REFINEMENT_PROMPT, Settings, apply_em_inf, resolve_strategy, with_our_fields

DEFAULT = Settings(em_inf_default=EMInfParams(threshold=0.2, stats="summary"))


def request(em_inf: Any = None, xargs: dict[str, Any] | None = None, **fields: Any) -> Any:
    return SimpleNamespace(em_inf=em_inf, vllm_xargs=xargs, **fields)


def test_settings_come_from_the_flags_and_else_from_their_defaults() -> None:
    settings = Settings.from_args(
        Namespace(em_inf_max_steps=7, model="m"), unavailable="no engine", versions={"vllm": "1"}
    )
    assert settings == Settings(em_inf_max_steps=7, unavailable="no engine", versions={"vllm": "1"})
    assert (settings.strategy_max_branches, settings.strategy_max_in_flight) == (64, 512)
    assert settings.strategy_refinement_prompt == REFINEMENT_PROMPT
    described = settings.describe()
    assert (described["available"], described["unavailable_because"]) == (False, "no engine")
    assert described["methods"]["em_inf"]["steps"]["maximum"] == 7
    assert Settings(em_inf_max_steps=3).describe()["methods"]["em_inf"]["steps"]["default"] == 3
    assert Settings().describe()["methods"]["em_inf"]["steps"]["maximum"] == MAX_STEPS


@pytest.mark.parametrize("strategies", [True, False])
def test_vllms_request_model_gets_our_fields(strategies: bool) -> None:
    class ChatCompletionRequest(BaseModel):
        model: str

    model = with_our_fields(ChatCompletionRequest, strategies)
    assert model.__name__ == "EMInfChatCompletionRequest"
    assert set(model.model_fields) == {"model", "em_inf"} | ({"strategy"} if strategies else set())
    parsed: Any = model.model_validate({"model": "m", "em_inf": {"steps": "not validated here"}})
    assert parsed.em_inf == {"steps": "not validated here"}


def test_settings_are_written_to_xargs_and_other_xargs_are_kept() -> None:
    asked = request({"steps": 3}, {"other": 1})
    params = apply_em_inf(asked, Settings())
    assert params == parse_params({"steps": 3})
    assert params
    assert asked.vllm_xargs == {"other": 1, "em_inf": params.model_dump()}
    flat = request(xargs={"em_inf_steps": 3})
    assert apply_em_inf(flat, Settings()) == params
    assert flat.vllm_xargs == {"em_inf": params.model_dump()}


@pytest.mark.parametrize("em_inf", [None, False])
def test_without_em_inf_nothing_is_passed_on(em_inf: Any) -> None:
    asked = request(em_inf)
    assert apply_em_inf(asked, Settings()) is None
    assert asked.vllm_xargs is None


def test_the_operators_default_is_for_requests_without_em_inf() -> None:
    assert apply_em_inf(request(), DEFAULT) == DEFAULT.em_inf_default
    assert apply_em_inf(request(True), DEFAULT) == DEFAULT.em_inf_default
    assert apply_em_inf(request(False), DEFAULT) is None


def test_a_default_that_cannot_work_is_dropped_and_a_request_that_asks_for_it_is_rejected() -> None:
    assert apply_em_inf(request(use_beam_search=True), DEFAULT) is None
    with pytest.raises(ParamsError, match=r"^body\.em_inf: cannot be combined with use_beam_search"):
        apply_em_inf(request(True, use_beam_search=True), DEFAULT)
    background = apply_em_inf(request(background=True), DEFAULT)
    assert background
    assert (background.stats, background.method) == ("none", "em_inf")
    with pytest.raises(ParamsError, match=r'^body\.em_inf\.stats: got "summary"; a background response has none'):
        apply_em_inf(request(True, background=True), DEFAULT)
    with pytest.raises(ParamsError, match=r"^body\.em_inf: a pooling model"):
        apply_em_inf(request(True), Settings(unavailable="a pooling model samples no tokens"))


@pytest.mark.parametrize(
    ("em_inf", "xargs", "says"),
    [
        ({"steps": 3}, {"em_inf_steps": 3}, r"^body\.em_inf: give either"),
        ({"steps": 9}, None, r"^body\.em_inf\.steps: got 9; this server allows an integer from 0 up to 8"),
        (
            None,
            {"em_inf_threshold": 99},
            r"^body\.vllm_xargs\.em_inf_threshold: got 99; must be a number from 0 up to 20",
        ),
        (
            None,
            {"em_inf_steps": 9},
            r"^body\.vllm_xargs\.em_inf_steps: got 9; this server allows an integer from 0 up to 8",
        ),
        (
            None,
            {"em_inf": {"steps": 9}},
            r"^body\.vllm_xargs\.em_inf\.steps: got 9; this server allows an integer from 0 up to 8",
        ),
    ],
)
def test_errors_name_where_the_setting_stood(em_inf: Any, xargs: Any, says: str) -> None:
    with pytest.raises(ParamsError, match=says):
        apply_em_inf(request(em_inf, xargs), Settings(em_inf_max_steps=8))


def chat(strategy: Any, **fields: Any) -> Any:
    defaults: dict[str, Any] = {"n": 1, "use_beam_search": False, "tools": None, "tool_choice": None}
    return SimpleNamespace(strategy=strategy, **defaults | fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "body.n"),
        ({"use_beam_search": True}, "body.use_beam_search"),
        ({"tools": [{}], "tool_choice": "auto"}, "body.tools"),
    ],
)
def test_a_strategy_rejects_fields_that_it_cannot_be_combined_with(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ParamsError) as caught:
        resolve_strategy(chat({"type": "refinement"}, **fields), None, Settings())
    assert caught.value.field == param


def test_a_strategy_is_resolved_with_the_operators_limit() -> None:
    settings = Settings(strategy_max_branches=4)
    strategy = resolve_strategy(chat({"type": "self_consistency"}, tools=[{}], tool_choice="none"), None, settings)
    assert strategy
    assert (strategy.type, strategy.max_branches) == ("self_consistency", 4)
    assert resolve_strategy(chat(None), None, settings) is None
    with pytest.raises(ParamsError, match=r"^body\.strategy\.n: got 5; this server allows an integer from 2 up to 4"):
        resolve_strategy(chat({"type": "self_consistency", "n": 5}), None, settings)


def test_weights_by_entropy_need_the_requests_stats() -> None:
    weighted = chat({"type": "self_consistency", "weights": "entropy"})
    for params in (None, EMInfParams()):
        with pytest.raises(ParamsError, match=r'^body\.strategy\.weights: got "entropy"; needs'):
            resolve_strategy(weighted, params, Settings())
    assert resolve_strategy(weighted, EMInfParams(stats="summary"), Settings())
