"""Errors in one line: the path of the field, the value received and what is allowed."""

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from em_sampler.validation import ParamsError, allowed_values, shorten, shorten_name, validate


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    low: int = Field(default=1, ge=1)
    high: int = Field(default=5, ge=0, lt=10)

    @model_validator(mode="after")
    def _ordered(self) -> "Inner":
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    rate: float = Field(default=0.5, gt=0, le=2)
    kind: Literal["one", "two"] = "one"
    type: Literal["outer"] = "outer"
    flag: bool = False
    text: str = Field(default="", max_length=8)
    name: str = ""
    optional: int | None = Field(default=None, ge=2)
    inner: Inner = Inner()


def test_settings_that_fit_are_returned_as_the_model() -> None:
    settings = {"rate": 1.5, "optional": None, "inner": {"low": 2, "high": 3}}
    assert validate(Outer, settings, "outer") == Outer(rate=1.5, inner=Inner(low=2, high=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0}, "outer.rate: got 0; must be a number above 0, up to 2"),
        ({"kind": "three"}, 'outer.kind: got "three"; must be one of one, two'),
        ({"type": "inner"}, 'outer.type: got "inner"; must be outer'),
        ({"flag": 1}, "outer.flag: got 1; must be true or false"),
        ({"text": "123456789"}, 'outer.text: got "123456789"; must be text of 0 to 8 characters'),
        ({"name": 5}, "outer.name: got 5; must be text"),
        ({"optional": 1}, "outer.optional: got 1; must be an integer from 2 up"),
        ({"inner": 7}, "outer.inner: got 7; must be an object"),
        ({"inner": {"low": 0}}, "outer.inner.low: got 0; must be an integer from 1 up"),
        ({"inner": {"high": 10}}, "outer.inner.high: got 10; must be an integer from 0 below 10"),
        ({"inner": {"low": 6}}, "outer.inner: low 6 is above high 5"),
        ({"inner": {"hight": 6}}, "outer.inner.hight: unknown field; known fields are low, high"),
        ({"x" * 100: 1}, f"outer.{'x' * 40}: unknown field; known fields are {', '.join(Outer.model_fields)}"),
    ],
)
def test_an_error_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError) as caught:
        validate(Outer, settings, "outer")
    assert str(caught.value) == message
    assert caught.value.field == message.partition(": ")[0]
    assert caught.value.problem == message.partition(": ")[2]
    assert isinstance(caught.value, ValueError)  # vLLM answers a ValueError with HTTP 400


def test_only_the_first_error_is_reported() -> None:
    with pytest.raises(ParamsError) as caught:
        validate(Outer, {"rate": 3, "flag": 1}, "outer")
    assert caught.value.field == "outer.rate"


class Counted(dict[str, Any]):
    """Settings that count how many of their items are read."""

    read = 0

    def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        for item in super().items():
            self.read += 1
            yield item


@pytest.mark.parametrize("within", ["", ".inner"])
def test_unknown_names_end_the_check_before_pydantic_sees_them(within: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outer, "model_validate", lambda settings: pytest.fail("pydantic was called"))
    unknown = Counted({f"x{number}": number for number in range(1000)})
    with pytest.raises(ParamsError) as caught:
        validate(Outer, {"inner": unknown} if within else unknown, "outer")
    assert caught.value.field == f"outer{within}.x0"
    assert unknown.read == 1


def test_a_float_that_is_a_whole_number_is_an_integer() -> None:
    assert validate(Outer, {"optional": 4.0, "rate": 1.0, "inner": {"high": 7.0}}, "outer") == Outer(
        optional=4, rate=1.0, inner=Inner(high=7)
    )
    for value, text in ((4.5, "4.5"), (1e300, "1e+300"), (float("inf"), "Infinity"), (float("nan"), "NaN")):
        with pytest.raises(ParamsError) as caught:
            validate(Outer, {"optional": value}, "outer")
        assert str(caught.value) == f"outer.optional: got {text}; must be an integer from 2 up"


class Echo(BaseModel):
    text: str

    @model_validator(mode="after")
    def _refuse(self) -> "Echo":
        raise ValueError(f"no good: {self.text}")


def test_a_rule_that_echoes_a_long_value_is_cut() -> None:
    with pytest.raises(ParamsError) as caught:
        validate(Echo, {"text": "a" * 5000}, "echo")
    assert caught.value.problem == f"no good: {'a' * 191}..."


def test_allowed_values_are_words() -> None:
    assert allowed_values(Outer, "rate") == "a number above 0, up to 2"
    assert allowed_values(Inner, "high") == "an integer from 0 below 10"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.25, "0.25"),
        (None, "null"),
        (True, "true"),
        ("", '"" (empty text)'),
        ("it's\n", '"it\'s\\n"'),
        ("é\ud800", '"é\\ud800"'),  # half a pair of surrogates cannot be sent back as it is
        (b"x", "\"b'x'\""),
        ("a" * 58, '"' + "a" * 58 + '"'),
        ("a" * 59, '"' + "a" * 59 + "..."),
        ("a" * 10**6, '"' + "a" * 59 + "..."),
        ({"a": 1}, "an object of 1 items"),
        ((1, 2), "a list of 2 items"),
        ([[1] * 10**6] * 3, "a list of 3 items"),
        (10**60, str(10**60)[:60] + "..."),
        (10**400, "a huge integer"),
        (-(10**400), "a huge integer"),
    ],
)
def test_a_value_is_shortened(value: object, text: str) -> None:
    assert shorten(value) == text


def test_a_name_is_shortened() -> None:
    assert shorten_name("x" * 100) == "x" * 40
    assert shorten_name(7) == "7"
    assert shorten_name("a\n\udfff") == "a\\n\\udfff"
