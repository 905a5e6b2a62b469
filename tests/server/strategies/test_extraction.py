"""Answers are found off the event loop, with a deadline, and a client that leaves loses no places."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from answers.extract import Answer
from server.strategies import extraction
from tests.server.strategies.scripted import Script, ScriptedEngine, ScriptedRun, box, vote

HANG_S = 60  # never reached if the code is right


@pytest.fixture(autouse=True)
def threads(answers_at_once: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadPoolExecutor(extraction.THREADS) as executor:
        monkeypatch.setattr(extraction, "_executor", executor)
        yield


class Slow:
    """Takes the place of `Answer.extract`: replies with "slow" wait until they are released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.original = Answer.extract
        self.released = threading.Event()
        self.entered = threading.Event()
        monkeypatch.setattr(Answer, "extract", lambda answer, reply: self._extract(answer, reply))

    def _extract(self, answer: Answer, reply: str) -> str | None:
        if "slow" in reply:
            self.entered.set()
            self.released.wait(HANG_S)
        return self.original(answer, reply)


def test_the_event_loop_goes_on_while_an_answer_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)

    async def main() -> str | None:
        finding = asyncio.ensure_future(extraction.find_answer(Answer(), "slow " + box(7)))
        while not slow.entered.is_set():
            await asyncio.sleep(0)
        assert not finding.done()
        assert await extraction.find_answer(Answer(), box(8)) == "8"  # another request's, meanwhile
        slow.released.set()
        return await finding

    assert asyncio.run(main()) == "7"


@pytest.mark.parametrize("kind", ["self_consistency", "deepconf", "refinement"])
def test_a_reply_whose_answer_takes_too_long_has_none(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    monkeypatch.setattr(extraction, "TIMEOUT_S", 0.01)
    settings = {"self_consistency": {"n": 3}, "deepconf": {"n": 3, "warmup": 1}, "refinement": {}}[kind]
    run = ScriptedRun({"type": kind} | settings, ScriptedEngine(*[Script("slow " + box(7))] * 3)).play()
    slow.released.set()
    assert (run.summary["answer"], run.summary["no_answer"], run.summary["completed"]) == (None, 3, 3)
    assert run.text == "slow " + box(7)


def test_a_request_looks_for_one_answer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all threads of the pool taken by one request, others would wait."""
    original, running, most = Answer.extract, [0], [0]

    def extract(answer: Answer, reply: str) -> str | None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        found = original(answer, reply)
        running[0] -= 1
        return found

    monkeypatch.setattr(Answer, "extract", extract)
    assert vote(*[Script(box(1))] * 40).summary["votes"] == {"1": 40}
    assert most == [1]


@pytest.mark.parametrize("kind", ["self_consistency", "deepconf", "refinement"])
def test_a_client_that_leaves_meanwhile_loses_no_places(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    settings = {"self_consistency": {"n": 3}, "deepconf": {"n": 3, "warmup": 1}, "refinement": {}}[kind]
    run = ScriptedRun({"type": kind} | settings, ScriptedEngine(*[Script("slow")] * 3))
    run.play(until=lambda _: slow.entered.is_set())
    slow.released.set()
    assert run.limit.taken == run.metric("branches_running") == 0
