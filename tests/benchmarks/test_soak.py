import json
from itertools import islice
from typing import Any

import httpx
import pytest

from benchmarks.soak import exchange
from benchmarks.soak.attacks import check_memory
from benchmarks.soak.cases import Cases
from benchmarks.soak.exchange import ANSWERED, BROKEN, CHAT, COMPLETIONS, OURS, REFUSED, RESPONSES, VLLMS, Case, Target
from benchmarks.soak.probe import Answers
from benchmarks.soak.report import Row, markdown

BODY = {"em_inf": True, "strategy": {}, "vllm_xargs": {"em_inf_steps": 1, "other": 2}, "n": 1}
ERROR = {"message": "no", "type": "BadRequestError", "param": "body.em_inf", "code": 400}
EVENTS = {"Content-Type": "text/event-stream"}


def outcome(monkeypatch: pytest.MonkeyPatch, case: Case, *answers: httpx.Response) -> exchange.Outcome:
    """How a case ends on a server that gives these answers, one after another."""
    left = iter(answers)
    transport = httpx.MockTransport(lambda _: next(left))
    monkeypatch.setattr(Target, "client", lambda _: httpx.Client(base_url="http://test", transport=transport))
    return Target("http://test", 1).send(case)


def stream(*events: str) -> httpx.Response:
    return httpx.Response(200, headers=EVENTS, text="".join(f"data: {event}\n\n" for event in events))


@pytest.mark.parametrize(
    ("case", "answer", "kind", "problem"),
    [
        (Case(CHAT, {}), httpx.Response(200, json={}), ANSWERED, ""),
        (Case(CHAT, {}), stream('{"choices": []}', "[DONE]"), ANSWERED, ""),
        (Case(RESPONSES, {}), stream('{"type": "response.completed"}'), ANSWERED, ""),
        (Case(CHAT, {}, plain=True), httpx.Response(400, json={"error": ERROR}), REFUSED, ""),
        (Case(CHAT, {}), stream(json.dumps({"error": ERROR}), "[DONE]"), REFUSED, ""),
        (Case(CHAT, {}), httpx.Response(400, json={"detail": "no"}), REFUSED, "not in OpenAI's shape"),
        (
            Case(CHAT, {}, plain=True),
            httpx.Response(400, json={"error": ERROR | {"param": None}}),
            REFUSED,
            "without the field's name",
        ),
        (Case(CHAT, {}), httpx.Response(422, json={"error": ERROR}), REFUSED, "not in OpenAI's shape"),
    ],
)
def test_a_response_is_judged(
    monkeypatch: pytest.MonkeyPatch, case: Case, answer: httpx.Response, kind: str, problem: str
) -> None:
    found = outcome(monkeypatch, case, answer)
    assert found.kind == kind
    assert problem in found.problem
    assert bool(problem) == bool(found.problem)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (httpx.Response(500, json={"error": ERROR | {"code": 500}}), OURS),
        (stream(json.dumps({"error": ERROR | {"code": 500}}), "[DONE]"), OURS),
        (stream('{"choices": []}'), BROKEN),
        (stream('{"threshold": NaN}', "[DONE]"), BROKEN),
        (httpx.Response(200, text='{"threshold": Infinity}'), BROKEN),
    ],
)
def test_a_fault_is_vllms_if_it_is_there_without_our_fields(
    monkeypatch: pytest.MonkeyPatch, answer: httpx.Response, kind: str
) -> None:
    ours = outcome(monkeypatch, Case(COMPLETIONS, BODY), answer, httpx.Response(200, json={}))
    assert (ours.kind, bool(ours.problem)) == (kind, True)
    assert outcome(monkeypatch, Case(COMPLETIONS, BODY), answer, answer) == exchange.Outcome(VLLMS)


def test_what_is_sent_to_compare_has_none_of_our_fields() -> None:
    assert Case(CHAT, BODY).without_our_fields().body == {"vllm_xargs": {"other": 2}, "n": 1}


def test_cases_follow_from_the_seed_and_reach_every_field() -> None:
    def bodies(seed: int) -> list[str]:
        cases = Cases(seed)
        return [case.text() for series in (cases.alone(), cases.combined()) for case in islice(series, 300)]

    assert bodies(1) == bodies(1) != bodies(2)
    text = "".join(bodies(1))
    for name in (
        "em_inf_steps",
        "max_temperature",
        "consensus",
        "structured_outputs",
        "[[[[",
        "NaN",
        "1e400",
        "9999999",
    ):
        assert name in text


def test_growth_above_the_bound_is_a_problem() -> None:
    row = Row("many")
    check_memory(row, {"a": 100.0, "b": 100.0}, {"a": 131.0, "b": 133.0}, 32)
    assert row.problems == ["b grew by 33 MiB; the bound is 32"]


def test_the_table_has_counts_and_problems() -> None:
    row = Row("fuzz", probes=Answers(asked=9, hangs=2, slowest_s=3.0))
    for kind in (ANSWERED, ANSWERED, OURS):
        row.add(exchange.Outcome(kind, "status 500" if kind == OURS else ""))
    text = markdown([row, Row("idle")], "Soak")
    assert "| fuzz | 3 | 2 | 0 | 1 | 0 | 0 | 0 | 2 |  |" in text
    assert text.endswith("- fuzz: status 500\n- fuzz: /health/live took more than 1 s, 2 times: 3.0 s\n")
    quiet: list[Any] = [Row("idle")]
    assert markdown(quiet, "Soak").endswith("None.\n")
