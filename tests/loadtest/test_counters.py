"""Token counters in the text of /metrics, as servers write it and as none should."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.counters import GENERATED, PROMPTED, counted_tokens


def test_all_labels_are_summed() -> None:
    text = f"""# HELP {GENERATED} Tokens.
# TYPE {GENERATED} counter
{GENERATED}{{model_name="a b",engine="0"}} 7.0
{GENERATED}{{model_name="x}} 9",engine="1"}} 1e2 1700000000000
{GENERATED}_created{{engine="0"}} 1.7e9
{PROMPTED} 5
other 3
"""
    assert counted_tokens(text) == (107, 5)


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "x", "", "1 2 3", "1e999"])
def test_a_value_that_is_no_number_is_no_count(value: str) -> None:
    assert counted_tokens(f"{GENERATED} {value}\n{PROMPTED} 5\n") in (None, (0, 5))


def test_a_server_without_these_counters_counts_nothing() -> None:
    assert counted_tokens("") is None
    assert counted_tokens("<html>") is None


@given(st.lists(st.one_of(st.sampled_from([GENERATED, PROMPTED, "{", "}", " ", "\t", "\n", "#", "NaN"]), st.text())))
def test_any_text_is_counts_or_none(parts: list[str]) -> None:
    found = counted_tokens("".join(parts))
    assert found is None or all(isinstance(count, int) for count in found)
