"""Headlines: sentences on votes and on the configs that are as accurate."""

import pytest

from loadtest.headlines import headlines
from tests.loadtest.example import comparison, config, results


def test_a_headline_lists_the_configs_as_accurate_as_a_vote():
    vote, better, worse = config("vote", 2.0, 0.6), config("better", 10.0, 0.62), config("worse", 20.0, 0.59)
    configs = [{"name": "vote", "vote": {"n": 4}}, {"name": "better"}, {"name": "worse"}]
    of = results(worse, better, vote, scenario={"arms": configs}, comparisons=[comparison(better, vote)])
    [(title, lines)] = headlines(of)
    assert title == "Configs at least as accurate as vote (0.6), under closed 8"
    assert lines == [
        "better: 5 times the answers per second (10 versus 2), accuracy 0.62; the difference, paired by question, "
        "is +0.020 (+0.000 to +0.040)"
    ]


@pytest.mark.parametrize(
    "vote", [{"body": {"strategy": {"type": "self_consistency", "n": 8}}}, {"body": {}, "vote": {"n": 8}}]
)
def test_a_headline_notes_that_a_loss_of_accuracy_is_not_excluded(vote):
    of = results(config("a", 10.0, 0.6), config("sc", 2.0, 0.6), scenario={"arms": {"a": None, "sc": vote}})
    [(_, [line])] = headlines(of)
    assert line.startswith("a: 5 times")
    assert line.endswith("so a loss of accuracy is not excluded")


def test_a_headline_if_no_config_is_as_accurate():
    of = results(
        config("sc", 2.0, 0.6), config("a", 10.0, 0.5), scenario={"arms": {"sc": {"vote": {"n": 2}}, "a": None}}
    )
    assert headlines(of)[0][1] == ["No other config."]


def test_without_votes_the_headline_compares_with_the_reference():
    of = results(config("a", 10.0, None), config("b", 5.0, None))
    assert headlines(of) == [
        (
            "Compared with a, under closed 8; accuracy was not measured",
            ["b: 0.5 times the answers per second (5 versus 10)"],
        )
    ]
