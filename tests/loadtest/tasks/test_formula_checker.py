"""Formulas compared by value; no formula may keep a run waiting."""

import asyncio
import subprocess
import time
from collections.abc import Iterator

import pytest

from loadtest.scenario import ScenarioError
from loadtest.tasks import formula_checker
from loadtest.tasks.formula_checker import FormulaChecker
from tests.answers.cases import CASES, CHECKS
from tests.loadtest.tasks.checking import check

HANGS = r"9^{9^{9^{9}}}"


@pytest.fixture(scope="module")
def boxed() -> Iterator[FormulaChecker]:
    checker = FormulaChecker()
    yield checker
    checker.close()


def test_text_and_integers_need_no_worker() -> None:
    checker = FormulaChecker()
    assert check(checker, r"\dfrac12", r"\boxed{0.5}", r"\boxed{1/2}", "0.5") == [True, True, False]
    assert check(checker, "12", r"\boxed{13}", r"\boxed{12.0}", "x" * 9, r"\boxed{" + "9" * 5000 + "}") == [
        False,
        True,
        False,
        False,
    ]
    assert check(checker, r"so it is \boxed{7}", r"\boxed{7}") == [True]
    assert checker.worker is None
    checker.close()


@pytest.mark.parametrize(
    ("answer", "correct", "wrong"),
    [
        (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2", r"\sqrt{3}/3"),
        ("x^2+2x+1", "(x+1)^2", "(x+2)^2"),
        (r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)", r"(\pi/2, 3)"),
        (r"\{1,2\}", r"\{2, 1\}", r"\{2\}"),
        ("1/3", r"2\cdot\frac16", "0.3"),
        (r"\text{Evelyn}", "Evelyn", "Navy"),
    ],
)
def test_formulas_are_compared_by_value(boxed: FormulaChecker, answer: str, correct: str, wrong: str) -> None:
    assert check(boxed, answer, f"so \\boxed{{{correct}}}", f"\\boxed{{{correct}}} no: \\boxed{{{wrong}}}") == [
        True,
        False,
    ]


@pytest.mark.parametrize(("source", "answer", "reply", "correct"), CHECKS)
def test_numbers_as_people_write_them(
    boxed: FormulaChecker, source: str, answer: str, reply: str, correct: bool
) -> None:
    assert check(boxed, answer, reply) == [correct], source


def test_every_writing_is_correct_for_its_form_without_a_worker() -> None:
    checker = FormulaChecker()
    for case in CASES:
        assert check(checker, case.boxed, f"\\boxed{{{case.written}}}") == [True], case
    assert checker.worker is None
    checker.close()


@pytest.mark.slow
def test_formulas_that_hang_are_wrong_in_time_and_the_next_check_works(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = FormulaChecker()
    start_worker = formula_checker._start_worker
    starts_s: list[float] = []

    def start_timed() -> subprocess.Popen[bytes]:
        began = time.monotonic()
        worker = start_worker()
        starts_s.append(time.monotonic() - began)
        return worker

    monkeypatch.setattr(formula_checker, "_start_worker", start_timed)
    try:
        assert check(checker, r"\sqrt{8}", r"\boxed{2\sqrt{2}}") == [True]
        checker.timeout_s = 1.0
        first = checker.worker
        starts_s.clear()
        began = time.monotonic()
        hostile = [HANGS, r"10^{10^{10}}", r"(10^{10^{9}})!", "9**9**9", r"\sum_{n=1}^{10^9} \sin(n^n)", "(" * 900]
        replies = [f"\\boxed{{{formula}}}" for formula in hostile]
        assert check(checker, r"\sqrt{8}", *replies) == [False] * len(hostile)
        # New workers import sympy, which takes long on a busy machine: the limit is for the comparisons alone.
        assert time.monotonic() - began - sum(starts_s) < 90
        checker.timeout_s = formula_checker.COMPARISON_TIMEOUT_S
        assert check(checker, r"\sqrt{8}", r"\boxed{\sqrt{2}\cdot2}", r"\boxed{3}") == [True, False]
        assert first is not None and checker.worker is not None
        assert first.pid != checker.worker.pid and first.returncode is not None
        monkeypatch.setattr(checker, "_ask_worker", lambda _: pytest.fail("results of these formulas are cached"))
        assert check(checker, r"\sqrt{8}", *replies) == [False] * len(hostile)
    finally:
        checker.close()
    assert checker.worker is None


def test_a_worker_that_died_is_replaced() -> None:
    checker = FormulaChecker()
    try:
        assert check(checker, "x+1", r"\boxed{1+x}") == [True]
        assert checker.worker is not None
        checker.worker.kill()
        checker.worker.wait()
        assert check(checker, "x+2", r"\boxed{2+x}") == [True]
    finally:
        checker.close()


def test_the_event_loop_continues_while_a_formula_hangs() -> None:
    checker = FormulaChecker(timeout_s=1.5)

    async def beats() -> int:
        slow = asyncio.create_task(checker.check("x", f"\\boxed{{{HANGS}}}"))
        count = 0
        while not slow.done():
            await asyncio.sleep(0.05)
            count += 1
        return count

    assert asyncio.run(beats()) >= 5
    checker.close()


def test_without_math_verify_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formula_checker.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ScenarioError, match="needs math-verify"):
        FormulaChecker()
