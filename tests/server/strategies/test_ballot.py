"""The winner of a vote: ties, and replies without any answer."""

from tests.server.strategies.scripted import Script, box, vote


def test_a_tie_goes_to_the_answer_with_the_higher_mean_logprob() -> None:
    scripts = [Script(box(1), logprob=-0.5), Script(box(2), logprob=-0.2, tokens=30)]
    assert vote(*scripts).summary["answer"] == "2"
    assert vote(*reversed(scripts)).summary["answer"] == "2"


def test_without_any_answer_the_likeliest_reply_is_taken() -> None:
    run = vote(Script("a", logprob=-2), Script("b", logprob=-1), Script("c", logprob=-3))
    assert run.text == "b"
    assert (run.summary["answer"], run.summary["votes"], run.summary["no_answer"]) == (None, {}, 3)
