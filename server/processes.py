"""The processes of one server end together: a child whose parent is gone ends itself.

vLLM's children outlive an API server that was killed, and keep its memory and its GPU.
"""

import os
import signal
import threading
import time

CHILD_ENV = "EM_INF_SERVER_CHILD"  # set by em-serve for the processes that it starts, themselves children of others
CHECK_S = 1.0


def end_with_parent() -> None:
    """Kill this process soon after its parent has ended, if em-serve or one of its children started it.

    vLLM starts its processes by `spawn`, which imports em-serve's main module in each before anything else.
    """
    if os.environ.get(CHILD_ENV):
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True, name="em-inf-parent").start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(CHECK_S)
    os.kill(os.getpid(), signal.SIGKILL)  # SIGTERM would start a drain for clients that are gone
