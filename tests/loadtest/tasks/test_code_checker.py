"""Code run with unit tests; no code may keep a run waiting, or pass without its tests."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.scenario import ScenarioError
from loadtest.tasks import code_checker
from loadtest.tasks.code_checker import CodeChecker
from tests.loadtest.tasks.checking import check

TESTS = "assert double(4) == 8"
CORRECT = "def double(x):\n    return 2 * x\n"


@pytest.fixture(scope="module")
def python() -> Iterator[CodeChecker]:
    checker = CodeChecker()
    yield checker
    checker.close()


@pytest.fixture(scope="module")
def hurried() -> Iterator[CodeChecker]:
    checker = CodeChecker(timeout_s=2.0)
    yield checker
    checker.close()


def test_code_is_correct_if_its_tests_pass(python: CodeChecker) -> None:
    replies = [
        f"Here:\n```python\n{CORRECT}```\nDone.",
        f"```python\ndouble = 1\n```\nBetter:\n```Python\n{CORRECT}```\n```\n8\n```",
        f"```\n{CORRECT}```",
        f"```python\n{CORRECT}",  # cut off
        CORRECT,
        f"<think>```python\nbad\n```</think>{CORRECT}",
        f"from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A: x: int\n{CORRECT}",
        f"{CORRECT}if __name__ == '__main__':\n    print(input())",
        f"import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n{CORRECT}",
        f"open('tests.py', 'w').write('x')\n{CORRECT}",
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
        f"{CORRECT}raise SystemExit",
        "def double(x):\n    import os\n    os._exit(0)",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, bytes(32))\n    except OSError: pass\nos._exit(0)",
        f"{CORRECT}import os\nos.closerange(3, 65536)",
        f"{CORRECT}x = bytearray(8 << 30)",
        f"{CORRECT}x = []\nwhile True: x.append(bytearray(64 << 20))",
        f"{CORRECT}open('big', 'wb').write(bytes(32 << 20))",
        f"{CORRECT}input()",
        f"{CORRECT}import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_code_that_does_not_reach_the_end_of_its_tests_is_wrong(python: CodeChecker, code: str) -> None:
    assert check(python, TESTS, f"```python\n{code}\n```", f"```python\n{CORRECT}```") == [False, True]


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
def test_code_that_does_not_end_is_killed(hurried: CodeChecker, code: str) -> None:
    began = time.monotonic()
    assert check(hurried, TESTS, CORRECT + code) == [False]
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("end", "correct", "timeouts_s"), [("", True, [600.0]), ("while True: pass", False, [2.0, 20.0, 200.0])]
)
def test_processes_that_code_leaves_behind_are_killed(
    tmp_path: Path, end: str, correct: bool, timeouts_s: list[float]
) -> None:
    """Longer timeouts are tried only on a machine too slow to start ten processes within the first."""
    pids = tmp_path / "pids"
    fork = f"""
import os, time
for _ in range(10):
    if os.fork() == 0:
        with open({str(pids)!r}, 'a') as file: file.write(f'{{os.getpid()}}\\n')
        time.sleep(600)
while len(open({str(pids)!r}).readlines()) < 10: time.sleep(0.01)
"""
    for timeout_s in timeouts_s:
        pids.write_text("")
        checker = CodeChecker(timeout_s)
        assert check(checker, TESTS, CORRECT + fork + end) == [correct]
        checker.close()
        left = [int(line) for line in pids.read_text().split()]
        if len(left) == 10:
            break
    assert len(left) == 10
    deadline = time.monotonic() + 10
    while (still := [pid for pid in left if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not still


def running(pid: int) -> bool:
    """Return whether a process exists and is no zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_code_has_limits_and_sees_neither_our_environment_nor_our_files(
    python: CodeChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    tests = f"""
import os, resource, sys
assert 'OPENAI_API_KEY' not in os.environ and 'PYTHONPATH' not in os.environ
assert os.getcwd() == os.environ['HOME'] != {os.getcwd()!r}
assert sorted(os.listdir()) == ['solution.py', 'tests.py']
assert sys.stdin.read() == ''
assert resource.getrlimit(resource.RLIMIT_AS) == ({code_checker.MEMORY_BYTES},) * 2
assert resource.getrlimit(resource.RLIMIT_CPU) == ({code_checker.CPU_S},) * 2
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == {code_checker.FILE_BYTES}
assert resource.getrlimit(resource.RLIMIT_NPROC)[0] > 256
assert sys.argv == ['solution.py']
"""
    assert check(python, tests, "x = 1") == [True]


def test_unit_tests_that_are_no_python_are_no_answer(python: CodeChecker) -> None:
    assert python.normalize("assert (") is None
    assert python.normalize("\0") is None
    assert python.normalize(r"assert '\d'") == r"assert '\d'"


def test_at_most_two_replies_run_at_a_time(python: CodeChecker, tmp_path: Path) -> None:
    code = f"""
import os, time
mine = os.path.join({str(tmp_path)!r}, str(os.getpid()))
open(mine, 'w').close()
time.sleep(0.3)
seen = len(os.listdir({str(tmp_path)!r}))
os.remove(mine)
"""
    assert check(python, "assert seen <= 2", *[code] * 6) == [True] * 6


def test_a_machine_that_cannot_run_code_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every reply would be wrong without a reason."""
    monkeypatch.setattr(code_checker, "FILE_BYTES", "nothing")
    with pytest.raises(ScenarioError, match="cannot run code"):
        CodeChecker()
