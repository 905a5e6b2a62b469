"""What counts as right; and that nothing that a model writes keeps a run waiting or passes without its tests."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.scenario import ScenarioError
from loadtest.tasks import checkers
from loadtest.tasks.checkers import LAST_NUMBER, Boxed, Equal, Number, Python, checker_of

HANGS = r"9^{9^{9^{9}}}"
EXACT, NUMBER = checker_of("exact"), checker_of("number")


def check(checker: Equal, answer: str, *replies: str) -> list[bool]:
    expected = checker.expected(answer)
    assert expected is not None

    async def all_of_it() -> list[bool]:
        return list(await asyncio.gather(*(checker.check(expected, reply) for reply in replies)))

    return asyncio.run(all_of_it())


# ---- By text and by value


def test_exact() -> None:
    assert check(EXACT, " Paris\n", "Paris", "<think>Rome</think> Paris ", "paris", "It is Paris", "") == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert check(EXACT, "0.50", "1/2", "0.51") == [True, False]


@given(value=st.integers(-(10**12), 10**12), other=st.integers(-(10**12), 10**12))
def test_a_number_is_right_by_value_however_it_is_written(value: int, other: int) -> None:
    forms = [
        str(value),
        f"{value:,}",
        f"{value}.0",
        f"${value}$",
        f"\\boxed{{{value:,}}}",
        f"\\boxed{{{value}/1}}",
        f"{value:+05d}",
    ]
    assert check(NUMBER, str(value), *(f"It was 5, now it is {form}." for form in forms)) == [True] * len(forms)
    assert {NUMBER.expected(form) for form in (str(value), f"{value:,}", f"${value}", f"{value} euros")} == {str(value)}
    wrong = [
        f"It is {value} and then {other}",
        f"{value} \\boxed{{{other}}}",
        f"\\boxed{{{other}}} = {value}",
        f"{value}5",
    ]
    assert check(NUMBER, str(value), *wrong) == [other == value] * 3 + [value == 0 and False]


def test_numbers_with_units_and_what_only_looks_like_one() -> None:
    assert check(NUMBER, "18", r"\boxed{18\text{ dollars}}", r"\boxed{x = 18}", r"\boxed{18\%}") == [True] * 3
    assert check(NUMBER, "10", r"\boxed{2^{10}}", r"\boxed{5\text{ or }10}", r"10 \boxed{ten}") == [False] * 3
    assert check(NUMBER, "0.5", r"\boxed{\frac{1}{2}}", r"\boxed{1/2\text{ cup}}", "half") == [True, True, False]
    assert [NUMBER.expected(text) for text in ("ten", "2^{10}", "1 or 2", "nan")] == [None] * 4


def test_the_number_of_a_long_hostile_box_is_found_at_once() -> None:
    began = time.monotonic()
    for text in ("1" + "," * 200_000 + "1", "{" * 200_000, "\\boxed{" * 50_000, "1/" * 100_000):
        NUMBER.find(f"\\boxed{{{text}}}")
    assert time.monotonic() - began < 10


# ---- Formulas


@pytest.fixture(scope="module")
def boxed() -> Iterator[Boxed]:
    checker = Boxed()
    yield checker
    checker.close()


def test_text_and_integers_need_no_worker() -> None:
    checker = Boxed()
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
    ("answer", "right", "wrong"),
    [
        (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2", r"\sqrt{3}/3"),
        ("x^2+2x+1", "(x+1)^2", "(x+2)^2"),
        (r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)", r"(\pi/2, 3)"),
        (r"\{1,2\}", r"\{2, 1\}", r"\{2\}"),
        ("1/3", r"2\cdot\frac16", "0.3"),
        (r"\text{Evelyn}", "Evelyn", "Navy"),
    ],
)
def test_formulas_are_compared_by_value(boxed: Boxed, answer: str, right: str, wrong: str) -> None:
    assert check(boxed, answer, f"so \\boxed{{{right}}}", f"\\boxed{{{right}}} no: \\boxed{{{wrong}}}") == [True, False]


def test_what_hangs_is_wrong_in_time_and_the_next_check_works() -> None:
    checker = Boxed(seconds=1.0)
    try:
        assert check(checker, r"\sqrt{8}", r"\boxed{2\sqrt{2}}") == [True]
        first = checker.worker
        began = time.monotonic()
        hostile = [HANGS, r"10^{10^{10}}", r"(10^{10^{9}})!", "9**9**9", r"\sum_{n=1}^{10^9} \sin(n^n)", "(" * 900]
        replies = [f"\\boxed{{{formula}}}" for formula in hostile]
        assert check(checker, r"\sqrt{8}", *replies) == [False] * len(hostile)
        assert time.monotonic() - began < 90
        assert check(checker, r"\sqrt{8}", r"\boxed{\sqrt{2}\cdot2}", r"\boxed{3}") == [True, False]
        assert first is not None and checker.worker is not None
        assert first.pid != checker.worker.pid and first.returncode is not None
        known = time.monotonic()
        assert check(checker, r"\sqrt{8}", *replies) == [False] * len(hostile)
        assert time.monotonic() - known < 1
    finally:
        checker.close()
    assert checker.worker is None


def test_a_worker_that_died_is_replaced() -> None:
    checker = Boxed()
    try:
        assert check(checker, "x+1", r"\boxed{1+x}") == [True]
        assert checker.worker is not None
        checker.worker.kill()
        checker.worker.wait()
        assert check(checker, "x+2", r"\boxed{2+x}") == [True]
    finally:
        checker.close()


def test_the_event_loop_goes_on_while_a_formula_hangs() -> None:
    checker = Boxed(seconds=1.5)

    async def beats() -> int:
        slow = asyncio.create_task(checker.check("x", f"\\boxed{{{HANGS}}}"))
        count = 0
        while not slow.done():
            await asyncio.sleep(0.05)
            count += 1
        return count

    assert asyncio.run(beats()) >= 5
    checker.close()


def test_without_math_verify_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ScenarioError, match="needs math-verify"):
        checker_of("boxed")


# ---- Code

TESTS = "assert double(4) == 8"
RIGHT = "def double(x):\n    return 2 * x\n"


@pytest.fixture(scope="module")
def python() -> Iterator[Python]:
    checker = Python()
    yield checker
    checker.close()


@pytest.fixture(scope="module")
def hurried() -> Iterator[Python]:
    checker = Python(seconds=2.0)
    yield checker
    checker.close()


def test_code_is_right_where_its_tests_pass(python: Python) -> None:
    replies = [
        f"Here:\n```python\n{RIGHT}```\nDone.",
        f"```python\ndouble = 1\n```\nBetter:\n```Python\n{RIGHT}```\n```\n8\n```",
        f"```\n{RIGHT}```",
        f"```python\n{RIGHT}",  # cut off
        RIGHT,
        f"<think>```python\nbad\n```</think>{RIGHT}",
        f"from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A: x: int\n{RIGHT}",
        f"{RIGHT}if __name__ == '__main__':\n    print(input())",
        f"import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n{RIGHT}",
        f"open('tests.py', 'w').write('x')\n{RIGHT}",
    ]
    assert check(python, TESTS, *replies) == [True] * len(replies)


@pytest.mark.parametrize(
    "code",
    [
        "def double(x):\n    return x * x + 1",
        "",
        "no code",
        "def double(x): return 2 * x)",
        "\0",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        f"{RIGHT}raise SystemExit",
        "def double(x):\n    import os\n    os._exit(0)",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, bytes(32))\n    except OSError: pass\nos._exit(0)",
        f"{RIGHT}import os\nos.closerange(3, 65536)",
        f"{RIGHT}x = bytearray(8 << 30)",
        f"{RIGHT}x = []\nwhile True: x.append(bytearray(64 << 20))",
        f"{RIGHT}open('big', 'wb').write(bytes(32 << 20))",
        f"{RIGHT}input()",
        f"{RIGHT}import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_code_that_does_not_come_to_the_end_of_its_tests_is_wrong(python: Python, code: str) -> None:
    assert check(python, TESTS, f"```python\n{code}\n```", f"```python\n{RIGHT}```") == [False, True]


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "while True: print('x' * 10_000)",
        "import time\ntime.sleep(600)",
        "import signal\nfor s in (1, 2, 3, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "x = 9**9**9",
    ],
)
def test_code_without_an_end_is_ended(hurried: Python, code: str) -> None:
    began = time.monotonic()
    assert check(hurried, TESTS, RIGHT + code) == [False]
    assert time.monotonic() - began < 30


def test_processes_that_code_leaves_behind_are_ended(hurried: Python, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    fork = f"""
import os, time
for _ in range(10):
    if os.fork() == 0:
        with open({str(pids)!r}, 'a') as file: file.write(f'{{os.getpid()}}\\n')
        time.sleep(600)
while len(open({str(pids)!r}).readlines()) < 10: time.sleep(0.01)
"""
    for end, right in (("", True), ("while True: pass", False)):
        pids.write_text("")
        assert check(hurried, TESTS, RIGHT + fork + end) == [right]
        left = [int(line) for line in pids.read_text().split()]
        assert len(left) == 10
        deadline = time.monotonic() + 10
        while (still := [pid for pid in left if running(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not still


def running(pid: int) -> bool:
    """Not a zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_code_has_its_limits_and_neither_our_environment_nor_our_files(
    python: Python, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    tests = f"""
import os, resource, sys
assert 'OPENAI_API_KEY' not in os.environ and 'PYTHONPATH' not in os.environ
assert os.getcwd() == os.environ['HOME'] != {os.getcwd()!r}
assert sorted(os.listdir()) == ['solution.py', 'tests.py']
assert sys.stdin.read() == ''
assert resource.getrlimit(resource.RLIMIT_AS) == ({checkers.MEMORY},) * 2
assert resource.getrlimit(resource.RLIMIT_CPU) == ({checkers.CODE_CPU_S},) * 2
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == {checkers.FILE_SIZE}
assert resource.getrlimit(resource.RLIMIT_NPROC)[0] > 256
assert sys.argv == ['solution.py']
"""
    assert check(python, tests, "x = 1") == [True]


def test_tests_that_are_no_python_are_no_answer(python: Python) -> None:
    assert python.expected("assert (") is None
    assert python.expected("\0") is None
    assert python.expected(r"assert '\d'") == r"assert '\d'"


def test_no_more_than_two_run_at_a_time(python: Python, tmp_path: Path) -> None:
    code = f"""
import os, time
mine = os.path.join({str(tmp_path)!r}, str(os.getpid()))
open(mine, 'w').close()
time.sleep(0.3)
seen = len(os.listdir({str(tmp_path)!r}))
os.remove(mine)
"""
    assert check(python, "assert seen <= 2", *[code] * 6) == [True] * 6


def test_where_code_cannot_run_a_scenario_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every reply would be wrong, and nobody would know why."""
    monkeypatch.setattr(checkers, "FILE_SIZE", "nothing")
    with pytest.raises(ScenarioError, match="cannot run code"):
        checker_of("python")


def test_closing_twice_is_well() -> None:
    for name in ("exact", "number", "boxed", "python"):
        checker = checker_of(name)
        checker.close()
        checker.close()
    assert Number(LAST_NUMBER).find("no number") is None
