"""Compares formulas by value with math-verify, in a process with limits on time and memory: algebra may hang."""

import asyncio
import importlib.util
import inspect
import json
import re
import select
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from loadtest.scenario import ScenarioError
from loadtest.tasks.text_checkers import BOXED, TextChecker, Verdict

COMPARISON_TIMEOUT_S = 10.0
START_TIMEOUT_S = 120.0  # for a process to start, on a machine under load
MAX_FORMULA = 4000  # characters; a longer formula is not correct
MEMORY_BYTES = 2 << 30  # address space of the process

_INTEGER = re.compile(r"-?\d+")


class FormulaChecker(TextChecker):
    """Compares the last box by value: text and numbers here, other formulas by math-verify in a worker process."""

    def __init__(self, timeout_s: float = COMPARISON_TIMEOUT_S) -> None:
        """`timeout_s` for one comparison: after it the worker is killed, and the reply is not correct."""
        super().__init__(BOXED)
        if importlib.util.find_spec("math_verify") is None:
            raise ScenarioError("task.checker: boxed needs math-verify: install em-inf-server[loadtest]")
        self.timeout_s = timeout_s
        self.worker: subprocess.Popen[bytes] | None = None
        self._results: dict[tuple[str, str], bool] = {}  # configs give the same answers again and again
        self._thread = ThreadPoolExecutor(max_workers=1)

    def normalize(self, given: str) -> str | None:
        """Return the content of the box; text without a box, all of it."""
        return BOXED.extract(given if "\\boxed{" in given else f"\\boxed{{{given}}}")

    async def check(self, expected: str, reply: str) -> Verdict:
        """Return whether both are the same number, text or formula."""
        found = self.find(reply)
        if found is None or found == expected or len(found) > MAX_FORMULA:
            return Verdict(found == expected)
        if _INTEGER.fullmatch(found) and _INTEGER.fullmatch(expected):
            return Verdict(False)
        run = asyncio.get_running_loop().run_in_executor
        return Verdict(await run(self._thread, self._are_equal, expected, found))

    def close(self) -> None:
        """End the worker."""
        self._thread.shutdown(cancel_futures=True)
        self._stop()

    def _are_equal(self, expected: str, found: str) -> bool:
        if (expected, found) not in self._results:
            self._results[expected, found] = self._ask_worker(json.dumps([expected, found]).encode() + b"\n") == b"1"
        return self._results[expected, found]

    def _ask_worker(self, line: bytes) -> bytes:
        """Return the worker's answer, a byte; none if it died or was too slow, so that it has to be replaced."""
        if self.worker is None or self.worker.poll() is not None:
            self._stop()
            self.worker = _start_worker()
        assert self.worker.stdin is not None
        with suppress(BrokenPipeError):
            self.worker.stdin.write(line)
        answer = _read_byte(self.worker, self.timeout_s)
        if not answer:
            self._stop()
        return answer

    def _stop(self) -> None:
        if self.worker:
            self.worker.kill()
            self.worker.communicate()
        self.worker = None


def _start_worker() -> subprocess.Popen[bytes]:
    """Start a worker and wait for its imports, so that no comparison's time includes them."""
    worker = subprocess.Popen(
        [sys.executable, "-P", "-c", f"{inspect.getsource(_worker_main)}\n_worker_main({MEMORY_BYTES})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,  # Ctrl-C is for the parent alone
    )
    if not _read_byte(worker, START_TIMEOUT_S):
        worker.kill()
        worker.communicate()
        raise RuntimeError("math-verify does not start: python -c 'import math_verify' says why")
    return worker


def _read_byte(worker: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    """Read a byte from the worker; none if that takes longer or the worker died."""
    assert worker.stdout is not None
    poll = select.poll()  # not select.select: it fails if a run has 1,024 connections open
    poll.register(worker.stdout, select.POLLIN)
    return worker.stdout.read(1) if poll.poll(timeout_s * 1000) else b""


def _worker_main(memory_bytes: int) -> None:
    """Compare pairs of formulas, a line of JSON each, and write a byte for each: the worker's complete program."""
    import json
    import resource
    import sys

    from math_verify import parse, verify

    hard_limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory_bytes if hard_limit == resource.RLIM_INFINITY else min(memory_bytes, hard_limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard_limit))
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # what a library prints must not be taken for an answer
    out.write(b"!")  # ready
    out.flush()
    for line in sys.stdin:
        expected, found = (parse(f"\\boxed{{{formula}}}") for formula in json.loads(line))
        out.write(b"1" if verify(expected, found) else b"0")
        out.flush()
