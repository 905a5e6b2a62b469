"""Runs a reply's code with unit tests, in a process with limits.

Limits are no sandbox: a model's code can read, delete and send whatever its user can. Run it where that is acceptable.
"""

import ast
import asyncio
import inspect
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from answers.extract import after_thinking
from loadtest.scenario import ScenarioError
from loadtest.tasks.text_checkers import TEXT, TextChecker

TIMEOUT_S = 20.0  # wall-clock time for a reply's code with its tests
START_TIMEOUT_S = 120.0  # for empty code, to find out whether this machine can run any
CPU_S = 10  # processor time of each process
MEMORY_BYTES = 2 << 30  # address space of each process
FILE_BYTES = 16 << 20  # size of each file
MAX_CONCURRENT = 2  # replies whose code runs at a time

_BLOCK = re.compile(r"^```[ \t]*(\w*)[^\n]*\n(.*?)(?:^```|\Z)", re.MULTILINE | re.DOTALL)


class CodeChecker(TextChecker):
    """Runs the last code block of a reply, then the unit tests that are its answer, in one process with limits.

    The limits: time, memory, size of files, number of processes; a temporary folder, no input, no output, none of our
    environment variables. They guard against accidents. Malicious code can do harm, and code can cheat, because it
    runs in the process of its tests. A process that leaves the process group survives the check, up to its CPU time.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        """`timeout_s` for one reply: after it its processes are killed, and the reply is not correct."""
        super().__init__(TEXT)
        self.timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(max_workers=MAX_CONCURRENT)
        if not _passes("", "", START_TIMEOUT_S):
            raise ScenarioError("task.checker: python cannot run code with limits on this machine")

    def normalize(self, given: str) -> str | None:
        """Return unit tests unchanged; None if they are not Python."""
        try:
            with warnings.catch_warnings(action="ignore"):
                ast.parse(given)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return None
        return given

    def find(self, reply: str) -> str | None:
        """Return the last block marked as Python, else the last unmarked block, else the reply."""
        answer = after_thinking(reply)
        blocks = [(language.lower(), code) for language, code in _BLOCK.findall(answer)]
        python = [code for language, code in blocks if language in ("python", "python3", "py")]
        unmarked = [code for language, code in blocks if not language]
        return (python or unmarked or [answer])[-1] or None

    async def check(self, expected: str, reply: str) -> bool:
        """Return whether the code of a reply, and then the tests, run to their end."""
        code = self.find(reply)
        if code is None:
            return False
        return await asyncio.get_running_loop().run_in_executor(self._threads, _passes, code, expected, self.timeout_s)

    def close(self) -> None:
        """Wait for running checks."""
        self._threads.shutdown(cancel_futures=True)


def _passes(code: str, tests: str, timeout_s: float) -> bool:
    """Return whether code and tests ran to their end: only then the child sends back a token that it received.

    The exit status would not show it: `sys.exit(0)` before the tests has the same.
    """
    token = secrets.token_bytes(32)
    parent_end, child_end = socket.socketpair()
    with TemporaryDirectory(prefix="em-loadtest-", ignore_cleanup_errors=True) as folder, parent_end, child_end:
        for name, content in (("solution.py", code), ("tests.py", tests)):
            Path(folder, name).write_bytes(content.encode(errors="replace"))
        parent_end.sendall(token)
        _run(folder, child_end.fileno(), timeout_s)
        parent_end.setblocking(False)
        try:
            return parent_end.recv(len(token)) == token
        except BlockingIOError:
            return False


def _run(folder: str, channel: int, timeout_s: float) -> None:
    """Run the child until it ends or its time is up, then kill its process group."""
    program = f"{inspect.getsource(_child_main)}\n_child_main({channel}, {CPU_S}, {MEMORY_BYTES}, {FILE_BYTES})"
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
        child.wait(timeout_s)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _child_main(channel: int, cpu_s: int, memory_bytes: int, file_bytes: int) -> None:
    """Set limits, which only root can lift again, run the code and its tests, and return the token.

    The child's complete program.
    """
    import glob
    import os
    import resource
    import sys
    import types
    from pathlib import Path

    os.set_inheritable(channel, False)
    processes = len(glob.glob("/proc/[0-9]*/task/*")) + 256  # the limit counts all processes of the user; root has none
    limits = {"CPU": cpu_s, "AS": memory_bytes, "FSIZE": file_bytes, "CORE": 0, "NPROC": processes}
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard_limit = resource.getrlimit(kind)[1]
        limit = limit if hard_limit == resource.RLIM_INFINITY else min(limit, hard_limit)
        resource.setrlimit(kind, (limit, limit))
    sys.argv = ["solution.py"]
    module = sys.modules["solution"] = types.ModuleType("solution")  # not __main__: skip what only scripts run
    for code in [compile(Path(name).read_bytes(), name, "exec") for name in ("solution.py", "tests.py")]:
        exec(code, vars(module))
    os.write(channel, os.read(channel, 32))
    os._exit(0)  # do not wait for threads that the code started
