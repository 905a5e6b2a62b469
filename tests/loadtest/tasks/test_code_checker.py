"""Code run with unit tests; no code may keep a run waiting, or pass without its tests."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from loadtest.scenario import ScenarioError, Task
from loadtest.tasks import code_checker, sandbox
from loadtest.tasks.code_checker import CodeChecker
from loadtest.tasks.text_checkers import Verdict
from tests.loadtest.tasks.checking import check, verdicts

TESTS = "assert double(4) == 8"
PR_GET_DUMPABLE = 3  # <sys/prctl.h>
CORRECT = "def double(x):\n    return 2 * x\n"


@pytest.fixture(scope="module")
def python() -> Iterator[CodeChecker]:
    checker = CodeChecker(unsafe=True)
    yield checker
    checker.close()


@pytest.fixture(scope="module")
def hurried() -> Iterator[CodeChecker]:
    checker = CodeChecker(timeout_s=2.0, unsafe=True)
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
        "import os\nfor fd in range(3, 4096):\n    try: os.write(fd, bytes(32))\n    except OSError: pass\nos._exit(0)",
        "import os\nfor fd in range(3, 4096):\n    try:\n        os.set_blocking(fd, False)\n"
        "        os.write(fd, os.read(fd, 32))\n    except OSError: pass\nos._exit(0)",
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


def test_the_block_that_defines_something_is_run_though_an_example_follows(python: CodeChecker) -> None:
    reply = f"```python\n{CORRECT}```\nUse it:\n```python\nprint(triple(4))\n```"
    assert python.find(reply) == CORRECT
    assert python.find("```python\nx = 1\n```\n```python\nx = 2\n```") == "x = 2\n"


# ---- Why code is wrong


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("def double(x):\n    return x", "AssertionError in tests.py: line 1"),
        ("def double(x):\n    return y", "NameError in solution.py: line 2, name 'y' is not defined"),
        ("def double(x): return 2 * x)", "SyntaxError in solution.py: line 1, unmatched ')'"),
        ("def double(x):\nreturn x", "IndentationError in solution.py: line 2, expected an indented block after"),
        ("", "no code in the reply"),
        (" ", "no code in the reply"),
        ("raise SystemExit", "SystemExit in solution.py: line 1"),
        ("raise ValueError('a\\n\\x1b[31mb\\u202e\\ud800')", r"ValueError in solution.py: line 1, a \x1b[31mb\u202e"),
        ("raise type('a\\nb', (Exception,), {})", "a b in solution.py: line 1"),
        ("x = bytearray(8 << 30)", "MemoryError in solution.py: line 1"),
        ("x = []\nwhile True: x.append(bytearray(64 << 20))", "MemoryError in solution.py: line 2"),
        ("def double(x): return double(x)", "RecursionError in solution.py: line 1, maximum recursion depth exceeded"),
        ("open('big', 'wb').write(bytes(32 << 20))", "OSError in solution.py: line 1, [Errno 27] File too large"),
        ("import os\nos._exit(0)", "ended before its tests did"),
        ("import os\nos.closerange(3, 65536)", "ended before its tests did"),
        ("import os\nos.kill(os.getpid(), 11)", "killed by signal 11 (Segmentation fault)"),
        ("import os\nos.kill(os.getpid(), 9)", "killed by signal 9 (Killed)"),
        ("class E(Exception):\n    def __str__(self): raise E\nraise E", "ended before its tests did"),
    ],
)
@pytest.mark.parametrize("namespaces", [True, False])
def test_a_wrong_reply_has_a_reason_in_one_line(
    python: CodeChecker, monkeypatch: pytest.MonkeyPatch, namespaces: bool, code: str, problem: str
) -> None:
    monkeypatch.setattr(python, "namespaces", namespaces and python.namespaces)
    (verdict,) = verdicts(python, TESTS, f"```python\n{code}\n```")
    assert not verdict.correct
    assert (verdict.problem or "").startswith(problem)


def test_code_that_does_not_end_has_a_reason(hurried: CodeChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(hurried, TESTS, "import time\ntime.sleep(600)") == [Verdict(False, "took more than 2 s")]
    monkeypatch.setattr(code_checker, "LIMITS", replace(code_checker.LIMITS, cpu_s=1))
    monkeypatch.setattr(hurried, "timeout_s", 120.0)
    assert verdicts(hurried, TESTS, "while True: pass") == [Verdict(False, "took more than 1 s of processor time")]


def test_a_reason_is_short_and_cannot_make_a_reply_correct(python: CodeChecker) -> None:
    """A stranger chooses it: it may be long, or what another code sends in its place."""
    send = "import os\nfor fd in range(3, 4096):\n    try: os.write(fd, {})\n    except OSError: pass\nos._exit(0)"
    long, *sent = verdicts(
        python,
        TESTS,
        "raise ValueError('\\x1b' * 10**7)",
        send.format("b'correct'"),
        send.format("b'\\xff\\n' * 99"),
        send.format("bytes(32)"),
    )
    assert long.problem is not None and len(long.problem) == code_checker.MAX_PROBLEM
    assert [verdict.correct for verdict in (long, *sent)] == [False] * 4
    assert sent[0].problem == "correct"
    assert all((verdict.problem or "").isprintable() and "\n" not in (verdict.problem or "") for verdict in sent)


def test_an_error_in_a_process_that_correct_code_makes_is_no_reason(python: CodeChecker) -> None:
    fork = "import os\nif not os.fork(): raise ValueError\nos.wait()"
    assert verdicts(python, TESTS, f"{CORRECT}{fork}") == [Verdict(True)]


# ---- No code outlives its check


@pytest.mark.parametrize("namespaces", [True, False])
@pytest.mark.parametrize("end", ["", "while True: pass"])
def test_no_process_survives_its_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, namespaces: bool, end: str
) -> None:
    """Nor one that has left the session and sleeps; and none of the launcher's."""
    fork = """
import os, time
for i in range(10):
    if os.fork() == 0:
        if i % 2: os.setsid()
        if os.fork() == 0: time.sleep(600)
        os._exit(0)
"""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the command lines of all its processes name this folder
    checker = in_namespaces(hurried_checker()) if namespaces else without_namespaces(monkeypatch, timeout_s=5.0)
    assert check(checker, TESTS, CORRECT + fork + end) == [not end]
    checker.close()
    deadline = time.monotonic() + 60
    while (left := processes_naming(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    assert not list(tmp_path.iterdir())


def hurried_checker() -> CodeChecker:
    return CodeChecker(timeout_s=5.0, unsafe=True)


def in_namespaces(checker: CodeChecker) -> CodeChecker:
    """Return a checker that runs code in namespaces; skip the test if this machine allows none."""
    if not checker.namespaces:
        checker.close()
        pytest.skip("THIS MACHINE ALLOWS NO NAMESPACES: that code can do no harm was not tested")
    return checker


def without_namespaces(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> CodeChecker:
    """Return a checker on a machine that allows no namespaces."""
    run = sandbox.run

    def refuse(*arguments: Any, namespaces: bool, **named: Any) -> None:
        if not namespaces:
            run(*arguments, namespaces=namespaces, **named)

    monkeypatch.setattr(sandbox, "run", refuse)
    monkeypatch.setattr(code_checker, "PR_SET_DUMPABLE", PR_GET_DUMPABLE)  # leave the tests' own process as it is
    return CodeChecker(**{"unsafe": True} | settings)


def processes_naming(folder: Path) -> list[str]:
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(folder).encode() in command.read_bytes():
                found.append(command.parent.name)
    return found


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
assert resource.getrlimit(resource.RLIMIT_AS) == ({code_checker.LIMITS.memory_bytes},) * 2
assert resource.getrlimit(resource.RLIMIT_CPU) == ({code_checker.LIMITS.cpu_s},) * 2
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == {code_checker.LIMITS.file_bytes}
assert resource.getrlimit(resource.RLIMIT_NPROC)[0] >= 256
assert sys.argv == ['solution.py']
"""
    assert check(python, tests, "x = 1") == [True]


def test_unit_tests_that_are_no_python_are_no_answer(python: CodeChecker) -> None:
    assert python.normalize("assert (") is None
    assert python.normalize("\0") is None
    assert python.normalize(r"assert '\d'") == r"assert '\d'"


def test_at_most_two_replies_run_at_a_time(python: CodeChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    run, lock, running, most = sandbox.run, threading.Lock(), [0], [0]

    def counted(*arguments: Any, **named: Any) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        run(*arguments, **named)
        with lock:
            running[0] -= 1

    monkeypatch.setattr(sandbox, "run", counted)
    assert check(python, TESTS, *[f"{CORRECT}import time\ntime.sleep(0.2)"] * 6) == [True] * 6
    assert most == [2]


def test_a_machine_that_cannot_run_code_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every reply would be wrong without a reason."""
    monkeypatch.setattr(sandbox, "run", lambda *_, **__: None)
    with pytest.raises(ScenarioError, match="cannot run code"):
        CodeChecker(unsafe=True)


def test_root_runs_no_code_without_namespaces_unless_told(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(ScenarioError, match=r"run as another user, or write `unsafe: true` in the task"):
        without_namespaces(monkeypatch, unsafe=False)
    monkeypatch.undo()
    told = without_namespaces(monkeypatch, unsafe=True)
    assert check(told, TESTS, CORRECT) == [True]
    told.close()
    monkeypatch.undo()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    without_namespaces(monkeypatch, unsafe=False).close()
    assert capsys.readouterr().err.count("code runs without namespaces: it can do what this user can") == 2


def test_without_namespaces_our_environment_is_not_readable() -> None:
    """A process that is not dumpable has an environment that only root can read; here it says whether it is."""
    program = f"""
import ctypes
from loadtest.tasks import code_checker, sandbox
run = sandbox.run
sandbox.run = lambda *a, namespaces: namespaces or run(*a, namespaces=False)
code_checker.CodeChecker(unsafe=True).close()
print(ctypes.CDLL(None).prctl({PR_GET_DUMPABLE}, 0, 0, 0, 0))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "0\n"


def test_a_scenario_says_whether_root_may_run_code_without_namespaces() -> None:
    task = {"type": "scicode", "path": "x"}
    assert TypeAdapter(Task).validate_python(task).unsafe is False
    assert TypeAdapter(Task).validate_python(task | {"unsafe": True}).unsafe is True


# ---- In namespaces


@pytest.fixture
def isolated(python: CodeChecker) -> CodeChecker:
    return in_namespaces(python)


REFUSED = [
    "open('/etc/shadow')",
    "open('/etc/passwd')",
    "os.listdir('/home')",
    "open('/usr/written', 'w')",
    "open(os.path.join(sys.prefix, 'written'), 'w')",
    "os.remove(os.__file__)",
    "os.chmod(os.__file__, 0o777)",
    "ctypes.CDLL(None).unshare(0x10000000) and os.listdir('/nowhere')",
    "socket.create_connection(('127.0.0.1', PORT))",
    "socket.create_connection(('192.0.2.1', 80), timeout=5)",
    "os.kill(OURS, 9)",
    "open(f'/proc/{OURS}/environ')",
    "open('/proc/1/environ')",
    "open('/proc/1/mem', 'rb')",
    "open(FILE)",
    "open(FILE + '.written', 'w')",
    "[open(str(i), 'wb').write(bytes(1 << 20)) for i in range(100)]",
    "[open(str(i), 'w').close() for i in range(20_000)]",
    "[os.fork() or time.sleep(600) for _ in range(300)]",
    "[threading.Thread(target=time.sleep, args=(600,), daemon=True).start() for _ in range(300)]",
    "bytearray(3 << 30)",
]


@pytest.mark.parametrize("harm", REFUSED)
def test_code_in_namespaces_can_do_no_harm(isolated: CodeChecker, tmp_path: Path, harm: str) -> None:
    """Each attempt fails in the code, as the tests of it notice; and nothing of ours has changed."""
    file = tmp_path / "secret"
    file.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"""
import ctypes, os, socket, sys, threading, time
PORT, OURS, FILE = {port}, {os.getpid()}, {str(file)!r}
refused = False
try:
    {harm}
except (OSError, MemoryError, RuntimeError):
    refused = True
"""
        assert check(isolated, "assert refused", code, "refused = True") == [True, True]
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("target", ["os.getppid()", "-1", "1", "0"])
def test_code_can_kill_no_process_but_its_own(isolated: CodeChecker, target: str) -> None:
    check(isolated, TESTS, f"{CORRECT}import os, signal\nos.kill({target}, signal.SIGKILL)")
    assert check(isolated, TESTS, CORRECT) == [True]


def test_the_environment_of_no_process_is_ours(isolated: CodeChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    code = """
import glob, os
found = ''
for path in glob.glob('/proc/[0-9]*/environ'):
    try: found += open(path).read()
    except OSError: pass
"""
    tests = "assert 'HOME=' in found and 'sk-secret' not in found and 'OPENAI' not in found"
    assert check(isolated, tests, code) == [True]


def test_code_in_namespaces_can_use_what_python_needs(isolated: CodeChecker) -> None:
    code = f"""{CORRECT}
import json, multiprocessing, numpy, random, subprocess, sys, tempfile, zoneinfo
numpy.linalg.inv(numpy.eye(2))
with tempfile.TemporaryFile() as file: file.write(b'x')
open('/dev/null', 'w').write('x')
random.SystemRandom().random()
assert subprocess.run([sys.executable, '-c', 'print(7)'], capture_output=True, check=True).stdout == b'7\\n'
multiprocessing.Lock()
"""
    assert check(isolated, TESTS, code) == [True]
