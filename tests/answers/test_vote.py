"""A vote: which answer leads, when the remaining votes cannot change that, and how probable the leader is."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from answers.vote import Vote


def vote(*answers: str, tie_break: float = -1.0, weights: list[float] | None = None) -> Vote:
    votes = Vote()
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        votes.add(answer, tie_break, weight)
    return votes


def test_most_votes_lead() -> None:
    assert vote("a", "b", "b", "c").ranking()[0] == "b"
    assert vote().ranking() == []
    assert vote().agreement() is None
    assert vote("a", "b", "b", "c").agreement() == 0.5


def test_a_tie_goes_to_the_answer_with_the_higher_mean_tie_break() -> None:
    votes = Vote()
    for answer, tie_break in (("a", -0.1), ("b", -0.3), ("a", -0.9), ("b", -0.3)):
        votes.add(answer, tie_break)
    assert votes.ranking() == ["b", "a"]  # means -0.5 and -0.3


def test_weights_can_outvote_a_majority() -> None:
    votes = vote("a", "a", "b", weights=[0.2, 0.3, 0.9])
    assert votes.ranking() == ["b", "a"]
    assert votes.counts == {"a": 2, "b": 1}


@given(st.lists(st.sampled_from("abc"), max_size=5), st.integers(0, 3))
def test_a_vote_is_decided_if_no_remaining_votes_can_change_the_leader(cast: list[str], remaining: int) -> None:
    """Checked against every outcome of the remaining votes; a tie is a change."""
    votes = vote(*cast)
    counts = Counter(cast)

    def alone_at_the_top(more: tuple[str, ...]) -> str | None:
        first, second, *_ = [*(counts + Counter(more)).most_common(2), ("", 0), ("", 0)]
        return first[0] if first[1] > second[1] else None

    outcomes = {alone_at_the_top(more) for more in itertools.product("abcd", repeat=remaining)}
    expected = len(outcomes) == 1 and outcomes != {None}
    assert votes.is_decided(remaining) == expected


def test_light_votes_decide_less() -> None:
    votes = vote("a", "b", weights=[0.9, 0.2])
    assert votes.is_decided(0)
    assert not votes.is_decided(1)
    assert votes.is_decided(1, max_weight=0.5)


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_leaders_probability_is_that_of_the_beta_distribution(first: int, second: int) -> None:
    low, high = sorted((first, second))
    votes = vote(*"a" * high, *"b" * low, "c" if low else "a")
    high += 0 if low else 1
    assert votes.leader_probability() == pytest.approx(beta.sf(0.5, high + 1, low + 1), abs=1e-12)


def test_without_votes_nothing_is_decided() -> None:
    assert Vote().leader_probability() == 0.5
    assert not Vote().is_decided(0)
