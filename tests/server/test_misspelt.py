"""Names that are nearly ours are refused with the right one; all others are left alone."""

from collections.abc import Iterator
from typing import Any

import pytest

from em_sampler.validation import ParamsError
from server.misspelt import MAX_NAMES, refuse_misspelt, refuse_misspelt_flat


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("em_inf_threshold", "em_inf.threshold"),
        ("em-inf-learning-rate", "em_inf.learning_rate"),
        ("emInfLearningRate", "em_inf.learning_rate"),
        ("em_inf.steps", "em_inf.steps"),
        ("em_inf_min_temperature", "em_inf.min_temperature"),
        ("em_inf_thresold", "em_inf"),
        ("em-inf", "em_inf"),
        ("eminf", "em_inf"),
        ("emInf", "em_inf"),
        ("em_Inf", "em_inf"),
        ("EM_INF", "em_inf"),
        ("Strategy", "strategy"),
        ("strategies", "strategy"),
        ("stratgy", "strategy"),
        ("startegy", "strategy"),
        ("_strategy", "strategy"),
    ],
)
def test_a_name_that_is_nearly_ours_is_refused(name: str, meant: str) -> None:
    with pytest.raises(ParamsError) as caught:
        refuse_misspelt({"other": 1, name: {"type": "deepconf"}})
    assert str(caught.value) == f"body.{name}: unknown field; did you mean body.{meant}?"
    refuse_misspelt({name: None})
    refuse_misspelt({name: False})
    with pytest.raises(ParamsError) as caught:
        refuse_misspelt({"extra_body": {name: 1}})
    assert caught.value.field == f"body.extra_body.{name}"


@pytest.mark.parametrize("field", ["em_inf", "strategy"])
def test_extra_body_is_no_field(field: str) -> None:
    with pytest.raises(ParamsError, match=f"^body.extra_body.{field}: unknown field; did you mean body.{field}?"):
        refuse_misspelt({"extra_body": {field: {}}})


def test_everything_else_is_left_alone() -> None:
    names = ["eminfo", "eminence", "em", "inf", "strict", "strat", "truncation_strategy", "category", "x" * 10**6, ""]
    refuse_misspelt(dict.fromkeys(names, 1) | {"extra_body": {"top_k": 3}, "other": {"em_inf": 1}})
    refuse_misspelt({"extra_body": "em_inf"})
    refuse_misspelt({"strategy": {"type": "deepconf"}, "em_inf": True})  # spelt well: others read them
    refuse_misspelt_flat({"em_inf": 1, "em_inf_steps": 3, "em_inf_x": 3, "strategies": 1, "eminfo": 1})


@pytest.mark.parametrize(("name", "meant"), [("em-inf-steps", "em_inf_steps"), ("emInf", "em_inf")])
def test_flat_names_that_are_nearly_ours_are_refused(name: str, meant: str) -> None:
    with pytest.raises(ParamsError) as caught:
        refuse_misspelt_flat({name: 1})
    assert str(caught.value) == f"body.vllm_xargs.{name}: unknown field; did you mean {meant}?"


class Counted(dict[str, Any]):
    read = 0

    def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        for item in super().items():
            self.read += 1
            yield item


def test_the_work_is_bounded() -> None:
    many = Counted({f"x{number}": 1 for number in range(10 * MAX_NAMES)})
    refuse_misspelt(many)
    assert many.read == MAX_NAMES
    refuse_misspelt({"extra_body": many})
