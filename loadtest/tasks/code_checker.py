"""Checks a reply's code: it is correct if it and the unit tests run to their end.

The code is a stranger's. tasks/sandbox.py runs it; docs/loadtest.md says what holds with and without namespaces.
"""

import ast
import asyncio
import ctypes
import os
import re
import secrets
import socket
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from answers.extract import after_thinking
from loadtest.inputs import one_line
from loadtest.scenario import ScenarioError
from loadtest.tasks import sandbox
from loadtest.tasks.text_checkers import TEXT, TextChecker, Verdict

TIMEOUT_S = 20.0  # wall-clock time for a reply's code with its tests
START_TIMEOUT_S = 120.0  # for empty code, to find out whether this machine can run any
LIMITS = sandbox.Limits(cpu_s=10, memory_bytes=2 << 30, file_bytes=16 << 20)
MAX_CONCURRENT = 2  # replies whose code runs at a time
MAX_PROBLEM = 200  # characters of a reason
NO_CODE = "no code in the reply"
NO_REASON = "ended before its tests did"

PR_SET_DUMPABLE = 4  # <sys/prctl.h>

_BLOCK = re.compile(r"^```[ \t]*(\w*)[^\n]*\n(.*?)(?:^```|\Z)", re.MULTILINE | re.DOTALL)
_DEFINITION = re.compile(r"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]", re.MULTILINE)


class CodeChecker(TextChecker):
    """Runs a code block of a reply, then the unit tests that are its answer, in one process with limits.

    In namespaces, if the kernel allows: then it sees and reaches nothing of ours. Code can cheat in any case, because
    it runs in the process of its tests.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S, unsafe: bool = False) -> None:
        """Find out how this machine can run code.

        Args:
            timeout_s: for one reply: after it its processes are killed, and the reply is not correct.
            unsafe: whether root runs code even without namespaces.

        Raises:
            ScenarioError: if it cannot, or only as root and without namespaces.
        """
        super().__init__(TEXT)
        self.timeout_s = timeout_s
        self.namespaces = _run("", "", START_TIMEOUT_S, namespaces=True).correct
        if not self.namespaces:
            self._do_without_namespaces(unsafe)
        self._threads = ThreadPoolExecutor(max_workers=MAX_CONCURRENT)

    def _do_without_namespaces(self, unsafe: bool) -> None:
        if os.geteuid() == 0 and not unsafe:
            raise ScenarioError(
                "task.checker: python runs a model's code, here as root, and this machine allows it no namespaces: "
                "run as another user, or write `unsafe: true` in the task if the code may do anything"
            )
        print("em-loadtest: code runs without namespaces: it can do what this user can", file=sys.stderr)
        # No process of this user can then read our environment, with the API key, in /proc.
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        if not _run("", "", START_TIMEOUT_S, namespaces=False).correct:
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
        """Return a block marked as Python, else an unmarked one, else the reply.

        Of several it is the last that defines something, or the last: examples of use often follow a function.
        """
        answer = after_thinking(reply)
        blocks = [(language.lower(), code) for language, code in _BLOCK.findall(answer)]
        python = [code for language, code in blocks if language in ("python", "python3", "py")]
        unmarked = [code for language, code in blocks if not language]
        found = python or unmarked or [answer]
        code = ([one for one in found if _DEFINITION.search(one)] or found)[-1]
        return code if code.strip() else None

    def files(self, code: str, expected: str) -> tuple[str, str]:
        """Return the program to run for a reply's code, and its unit tests."""
        return code, expected

    async def check(self, expected: str, reply: str) -> Verdict:
        """Return whether the code of a reply, and then the tests, run to their end; and why not, in one line."""
        code = self.find(reply)
        if code is None:
            return Verdict(False, NO_CODE)
        run = partial(_run, *self.files(code, expected), self.timeout_s, self.namespaces)
        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    def close(self) -> None:
        """Wait for running checks."""
        self._threads.shutdown(cancel_futures=True)


def _run(program: str, tests: str, timeout_s: float, namespaces: bool) -> Verdict:
    """Run a program and its tests. It is correct if they ran to their end: then alone a child sends back a token.

    The exit status would not show it: `sys.exit(0)` before the tests has the same.
    """
    token = secrets.token_bytes(sandbox.TOKEN_BYTES)
    parent_end, child_end = socket.socketpair()
    with TemporaryDirectory(prefix="em-loadtest-", ignore_cleanup_errors=True) as folder, parent_end, child_end:
        for name, content in ((sandbox.SOLUTION, program), (sandbox.TESTS, tests)):
            Path(folder, name).write_bytes(content.encode(errors="replace"))
        parent_end.sendall(token)
        channel = child_end.fileno()
        killed = sandbox.run(os.path.realpath(folder), channel, LIMITS, timeout_s, namespaces=namespaces)
        parent_end.setblocking(False)
        try:
            sent = parent_end.recv(sandbox.TOKEN_BYTES + sandbox.MAX_REASON_BYTES)
        except OSError:  # nothing was sent, or the child never read the token
            sent = b""
    if sent.startswith(token):
        return Verdict(True)
    return Verdict(False, killed or _shown(sent) or NO_REASON)


def _shown(reason: bytes) -> str:
    """Return a stranger's text as one short line without control characters."""
    return one_line(reason.decode(errors="replace"))[:MAX_PROBLEM]
