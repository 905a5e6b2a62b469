"""Whether a reply is right. What may hang, computer algebra and a model's code, runs in processes with limits.

Limits are no sandbox: a model's code can read, delete and send whatever its user can. Run it where that may happen.
"""

import ast
import asyncio
import importlib.util
import inspect
import json
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from answers.extract import Answer, after_thinking
from loadtest.scenario import Checker, ScenarioError

TEXT, BOXED, LAST_NUMBER = Answer(type="text"), Answer(type="boxed"), Answer(type="last_number")
MATH_S = 10.0  # seconds for one comparison of formulas
START_S = 120.0  # seconds for a process to start, on a machine under load
LONGEST = 4000  # characters of a formula; longer ones are wrong
CODE_S = 20.0  # seconds by the clock for a reply's code with its tests
CODE_CPU_S = 10  # seconds of one core, for each of its processes
MEMORY = 2 << 30  # bytes of address space, for each process
FILE_SIZE = 16 << 20  # bytes, for each file
AT_A_TIME = 2  # processes with a model's code

_VALUE = re.compile(r"-?\d+(?:\.\d+|/\d+)?")  # how Answer writes a number
_DIGITS = re.compile(r"\d[\d,./]*")
_INTEGER = re.compile(r"-?\d+")
_BLOCK = re.compile(r"^```[ \t]*(\w*)[^\n]*\n(.*?)(?:^```|\Z)", re.MULTILINE | re.DOTALL)


def checker_of(name: Checker) -> "Equal":
    """A checker by its name.

    Raises:
        ScenarioError: where this machine cannot run it.
    """
    if name == "boxed":
        return Boxed()
    if name == "python":
        return Python()
    return Number(LAST_NUMBER) if name == "number" else Equal(TEXT)


class Equal:
    """Right is what has the same normal form."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def expected(self, given: str) -> str | None:
        """A file's answer in its normal form; None where it cannot be one."""
        return TEXT.extract(given)

    def find(self, reply: str) -> str | None:
        """The answer in a reply, in its normal form."""
        return self.answer.extract(reply)

    async def check(self, expected: str, reply: str) -> bool:
        """Whether a reply has the expected answer."""
        return self.find(reply) == expected

    def close(self) -> None:
        """Ends its processes."""


class Number(Equal):
    """The number in the last box, or the last in the reply, by value."""

    def expected(self, given: str) -> str | None:
        """A number, units beside it dropped."""
        number = _one_number(TEXT.extract(given) or "")
        return number if _VALUE.fullmatch(number) else None

    def find(self, reply: str) -> str | None:
        """A number; or a box's content that is none."""
        boxed = BOXED.extract(reply)
        return super().find(reply) if boxed is None else _one_number(boxed)


def _one_number(text: str) -> str:
    """The only number of a text such as `18 dollars`; `2^{10}` has two, and neither is its value."""
    alone = len(_DIGITS.findall(text)) == 1 and not _VALUE.fullmatch(text)
    return (LAST_NUMBER.extract(text) if alone else None) or text


class Boxed(Equal):
    """The last box, by value: text and numbers here, what they leave open by math-verify in a process of its own."""

    def __init__(self, seconds: float = MATH_S) -> None:
        """`seconds` for one comparison: then its process is killed, and the reply is wrong."""
        super().__init__(BOXED)
        if importlib.util.find_spec("math_verify") is None:
            raise ScenarioError("task.checker: boxed needs math-verify: install em-inf-server[loadtest]")
        self.seconds = seconds
        self.worker: subprocess.Popen[bytes] | None = None
        self._known: dict[tuple[str, str], bool] = {}  # arms give the same answers again and again
        self._thread = ThreadPoolExecutor(max_workers=1)

    def expected(self, given: str) -> str | None:
        """The content of a box; a whole solution has one."""
        return BOXED.extract(given if "\\boxed{" in given else f"\\boxed{{{given}}}")

    async def check(self, expected: str, reply: str) -> bool:
        """Whether both are the same number, text or formula."""
        found = self.find(reply)
        if found is None or found == expected or len(found) > LONGEST:
            return found == expected
        if _INTEGER.fullmatch(found) and _INTEGER.fullmatch(expected):
            return False
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._same, expected, found)

    def close(self) -> None:
        """Ends the worker."""
        self._thread.shutdown(cancel_futures=True)
        self._stop()

    def _same(self, expected: str, found: str) -> bool:
        if (expected, found) not in self._known:
            self._known[expected, found] = self._ask(json.dumps([expected, found]).encode() + b"\n") == b"1"
        return self._known[expected, found]

    def _ask(self, line: bytes) -> bytes:
        """The worker's answer, a byte; none where it died or was too slow and is to be replaced."""
        if self.worker is None or self.worker.poll() is not None:
            self._stop()
            self.worker = _started()
        assert self.worker.stdin is not None
        with suppress(BrokenPipeError):
            self.worker.stdin.write(line)
        answer = _byte(self.worker, self.seconds)
        if not answer:
            self._stop()
        return answer

    def _stop(self) -> None:
        if self.worker:
            self.worker.kill()
            self.worker.communicate()
        self.worker = None


def _started() -> subprocess.Popen[bytes]:
    """A worker whose imports are done, so that no comparison pays for them."""
    worker = subprocess.Popen(
        [sys.executable, "-P", "-c", f"{inspect.getsource(_compare)}\n_compare({MEMORY})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,  # Ctrl-C is for us
    )
    if not _byte(worker, START_S):
        worker.kill()
        worker.communicate()
        raise RuntimeError("math-verify does not start: python -c 'import math_verify' says why")
    return worker


def _byte(worker: subprocess.Popen[bytes], seconds: float) -> bytes:
    """What the worker says; nothing where that takes longer or it died."""
    assert worker.stdout is not None
    poll = select.poll()  # not select.select: that fails where a run has 1024 connections open
    poll.register(worker.stdout, select.POLLIN)
    return worker.stdout.read(1) if poll.poll(seconds * 1000) else b""


def _compare(memory: int) -> None:
    """All of the worker's program: pairs of formulas in, a line each; a byte out for each."""
    import json
    import resource
    import sys

    from math_verify import parse, verify

    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (memory if most == resource.RLIM_INFINITY else min(memory, most), most))
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # what a library prints is no answer
    out.write(b"!")  # ready
    out.flush()
    for line in sys.stdin:
        expected, found = (parse(f"\\boxed{{{formula}}}") for formula in json.loads(line))
        out.write(b"1" if verify(expected, found) else b"0")
        out.flush()


class Python(Equal):
    """The last block of code of a reply, then the unit tests that are its answer, in one process with limits.

    The limits: time, memory, size of files, number of processes; a temporary folder, no input, no output, none of our
    environment. They are against accidents. Code that means harm can do it, and code that means to cheat can pass: it
    runs in the process of its tests. What leaves the process group outlives the check, up to its CPU time.
    """

    def __init__(self, seconds: float = CODE_S) -> None:
        """`seconds` by the clock for one reply: then its processes are killed, and it is wrong."""
        super().__init__(TEXT)
        self.seconds = seconds
        self._threads = ThreadPoolExecutor(max_workers=AT_A_TIME)
        if not _passes("", "", START_S):
            raise ScenarioError("task.checker: python cannot run code with limits on this machine")

    def expected(self, given: str) -> str | None:
        """Unit tests as they are, if they are Python."""
        try:
            with warnings.catch_warnings(action="ignore"):
                ast.parse(given)
        except (SyntaxError, ValueError):
            return None
        return given

    def find(self, reply: str) -> str | None:
        """The last block marked as Python, or the last without a mark, or all."""
        said = after_thinking(reply)
        blocks = [(mark.lower(), code) for mark, code in _BLOCK.findall(said)]
        marked = [code for mark, code in blocks if mark in ("python", "python3", "py")]
        return (marked or [code for mark, code in blocks if not mark] or [said])[-1] or None

    async def check(self, expected: str, reply: str) -> bool:
        """Whether the code of a reply ends well, and the tests after it."""
        code = self.find(reply)
        if code is None:
            return False
        return await asyncio.get_running_loop().run_in_executor(self._threads, _passes, code, expected, self.seconds)

    def close(self) -> None:
        """Waits for what runs."""
        self._threads.shutdown(cancel_futures=True)


def _passes(code: str, tests: str, seconds: float) -> bool:
    """Whether code and tests came to their end: then the child sends back the token that waits for it there.

    An exit status would not say: `sys.exit(0)` before the tests has the same.
    """
    token = secrets.token_bytes(32)
    ours, theirs = socket.socketpair()
    with TemporaryDirectory(prefix="em-loadtest-", ignore_cleanup_errors=True) as folder, ours, theirs:
        for name, content in (("solution.py", code), ("tests.py", tests)):
            Path(folder, name).write_bytes(content.encode(errors="replace"))
        ours.sendall(token)
        _run(folder, theirs.fileno(), seconds)
        ours.setblocking(False)
        try:
            return ours.recv(len(token)) == token
        except BlockingIOError:
            return False


def _run(folder: str, channel: int, seconds: float) -> None:
    """The child, until it ends or its time is up; then all of its process group is killed."""
    program = f"{inspect.getsource(_limited)}\n_limited({channel}, {CODE_CPU_S}, {MEMORY}, {FILE_SIZE})"
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", program],
        cwd=folder,
        env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"} | one_thread,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[channel],
        start_new_session=True,
    )
    with suppress(subprocess.TimeoutExpired):
        child.wait(seconds)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _limited(channel: int, cpu_s: int, memory: int, file_size: int) -> None:
    """All of the child's program: limits, which root alone can lift again; the code, its tests, the token."""
    import glob
    import os
    import resource
    import sys
    import types
    from pathlib import Path

    os.set_inheritable(channel, False)
    processes = len(glob.glob("/proc/[0-9]*/task/*")) + 256  # the limit is on all of the user's; root has none
    limits = {"CPU": cpu_s, "AS": memory, "FSIZE": file_size, "CORE": 0, "NPROC": processes}
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(kind)[1]
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(kind, (limit, limit))
    sys.argv = ["solution.py"]
    module = sys.modules["solution"] = types.ModuleType("solution")  # not __main__: what only scripts do is left out
    for code in [compile(Path(name).read_bytes(), name, "exec") for name in ("solution.py", "tests.py")]:
        exec(code, vars(module))
    os.write(channel, os.read(channel, 32))
    os._exit(0)  # threads of the code's need not end
