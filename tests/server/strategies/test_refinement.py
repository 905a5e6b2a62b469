"""Refinement: rounds that follow from one another, agreement, and rounds that fail or do not fit."""

from typing import Any

from tests.server.strategies.scripted import Script, ScriptedEngine, ScriptedRun, box


def refine(*scripts: Script, **settings: Any) -> ScriptedRun:
    return ScriptedRun({"type": "refinement"} | settings, ScriptedEngine(*scripts)).play()


def test_each_round_follows_from_the_reply_before_it() -> None:
    run = refine(*(Script(box(i)) for i in range(4)), rounds=4)
    assert run.engine.prompts == [None, *(f"after {box(i)}" for i in range(3))]
    assert run.text == box(3)
    assert run.summary["answers"] == ["0", "1", "2", "3"]
    assert run.summary["rounds"] == run.summary["completed"] == 4
    assert run.run.usage({})["total_tokens"] == 4 * (2 + 3)


def test_it_stops_when_two_rounds_agree() -> None:
    texts = [box(1), "none", "none", box("2.0"), box(2), box(9)]
    run = refine(*map(Script, texts), rounds=6)
    assert run.summary["answers"] == ["1", None, None, "2", "2"]
    assert run.summary["answer"] == "2"
    assert run.summary["no_answer"] == 2
    assert run.metric("tokens_saved_total") == 3  # of the round that was not needed


def test_if_a_round_fails_or_does_not_fit_the_reply_before_it_is_returned() -> None:
    failed = refine(Script(box(1)), Script(box(2), fails=ValueError("x")), Script(box(3)))
    assert (failed.text, failed.states()) == (box(1), ["completed", "failed"])
    for reason in ("context", "template"):
        stopped = refine(Script(reason), Script(box(2)))
        assert (stopped.text, stopped.summary["stopped_by"]) == (reason, reason)


def test_if_a_round_is_cut_off_the_complete_reply_before_it_is_returned() -> None:
    cut = refine(Script(box(1)), Script("so", fails="length"), Script(box(3)))
    assert (cut.text, cut.summary["stopped_by"], cut.summary["answers"]) == (box(1), "length", ["1"])
    # A reply that was cut off itself is not preferred to the next one.
    short = refine(Script("so", fails="length"), Script("and", fails="length"), Script(box(3)))
    assert (short.text, short.summary["answers"]) == (box(3), [None, None, "3"])
