"""Runs tasks on the threads that torch computes with.

vLLM has bound these to cores, and further threads would be in their way. Calls the function of the OpenMP runtime that
compilers call for `#pragma omp parallel`.
"""

import ctypes
from collections import deque
from collections.abc import Callable, Iterable

_RUNTIME = ctypes.CDLL(None)  # torch has loaded its OpenMP for the process
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def available() -> bool:
    """Return whether torch's OpenMP runtime has the function that `run_all` calls."""
    return hasattr(_RUNTIME, "GOMP_parallel")


def run_all(tasks: Iterable[Callable[[], object]]) -> None:
    """Call every task once, each on its own thread as long as there are threads, and wait until all have ended.

    Raises:
        Exception: the first that a task raised, after all have ended.
    """
    waiting, errors = deque(tasks), list[BaseException]()
    threads = len(waiting)

    def body(_: int | None) -> None:
        while True:  # OpenMP may give fewer threads than requested
            try:
                task = waiting.popleft()
            except IndexError:
                return
            try:
                task()
            except BaseException as error:  # it cannot pass through the runtime
                errors.append(error)

    if threads > 1 and available():
        _RUNTIME.GOMP_parallel(_BODY(body), None, ctypes.c_uint(threads), ctypes.c_uint(0))
    else:
        body(None)
    if errors:
        raise errors[0]
