"""Runs work on the threads that torch itself computes with: vLLM has bound those to cores, where others would be in the
way. Calls the one function of the OpenMP runtime that compilers call for `#pragma omp parallel`.
"""

import ctypes
from collections import deque
from collections.abc import Callable, Iterable

_RUNTIME = ctypes.CDLL(None)  # torch has loaded its OpenMP for the whole process
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def available() -> bool:
    """Whether torch's OpenMP is one that can be called."""
    return hasattr(_RUNTIME, "GOMP_parallel")


def run_all(work: Iterable[Callable[[], object]]) -> None:
    """Call every one of `work` once, each on a thread of its own as far as there are threads.

    Raises:
        Exception: the first that one of them raised, when all have ended.
    """
    waiting, errors = deque(work), list[BaseException]()
    threads = len(waiting)

    def body(_: int | None) -> None:
        while True:  # OpenMP may give fewer threads than it was asked for
            try:
                call = waiting.popleft()
            except IndexError:
                return
            try:
                call()
            except BaseException as error:  # it cannot pass through the runtime
                errors.append(error)

    if threads > 1 and available():
        _RUNTIME.GOMP_parallel(_BODY(body), None, ctypes.c_uint(threads), ctypes.c_uint(0))
    else:
        body(None)
    if errors:
        raise errors[0]
