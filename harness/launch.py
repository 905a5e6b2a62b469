"""Starts em-serve, or vLLM's own server with the plugin or without it, on a free port of 127.0.0.1 until a block ends.

A server runs in a session of its own and writes a log file; at the end of the block all its processes are stopped.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import psutil

from harness.ports import free_port

EM_SERVE = (sys.executable, "-m", "server.cli")
STOCK_VLLM = (sys.executable, "-m", "harness.stock_vllm")
PLAIN_VLLM = (sys.executable, "-m", "harness.plain_vllm")
THREADS = max(1, len(os.sched_getaffinity(0)) - 1)  # of the model on the CPU: vLLM's own choice
# vLLM's CPU build accepts the executor "uni" only with the first variable, and then does not set the second one.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(THREADS)}
PASSED_ON = ("VLLM_GPU_SYNC_CHECK",)  # benchmarks/gpu.sh sets it: vLLM then checks that the host waits for no kernel
START_LIMIT_S = 900  # a 7B model on CUDA first compiles and captures graphs; a server that dies is noticed at once
STOP_LIMIT_S = 20

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """A running server that answers at `url`."""

    url: str
    log: Path
    pid: int

    def processes(self) -> list[psutil.Process]:
        """Return the server's main process, then every process below it."""
        root = psutil.Process(self.pid)
        return [root, *root.children(recursive=True)]


def environment() -> dict[str, str]:
    """Return this process's environment without vLLM's variables but PASSED_ON, and with what every server needs."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_") or key in PASSED_ON}
    chosen = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM would take nearly all of the machine's memory
    }
    return inherited | chosen


@contextlib.contextmanager
def serve(*command: str, log: Path, executor: str = "uni", env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run `command` on a free port and yield as soon as the server is healthy. The arguments are those of `started`.

    Raises:
        RuntimeError: if the server ends, or is not healthy within START_LIMIT_S; with the end of its log.
    """
    port = free_port()
    address = ("--host", "127.0.0.1", "--port", str(port))
    with started(*command, *address, log=log, executor=executor, env=env) as process:
        server = Server(f"http://127.0.0.1:{port}", log, process.pid)
        _wait_until_healthy(server, process)
        yield server


@contextlib.contextmanager
def started(
    *command: str, log: Path, executor: str = "uni", env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` until the block ends, without waiting until it is healthy.

    Args:
        command: the program and its arguments, without the executor.
        log: file for its standard output and standard error.
        executor: "uni" runs the model in the engine's process, vLLM's default on one CUDA device. "mp" gives the model
            a process of its own, the default on the CPU. There, both processes spin on sched_yield while they wait for
            each other: on two cores the same load took 0.6 s in some runs and 5 s in others.
        env: variables that are added to `environment()`.
    """
    flags = ("--distributed-executor-backend", executor, "--disable-uvicorn-access-log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *flags],
            env=environment() | (ONE_PROCESS if executor == "uni" else {}) | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop(process)


@contextlib.contextmanager
def together(*servers: contextlib.AbstractContextManager[T]) -> Iterator[list[T]]:
    """Start several servers at the same time: most of a start is imports, which use one core."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        yield list(pool.map(stack.enter_context, servers))


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{server.log.read_text(errors='replace')[-4000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to stop, then kill what is left of its process group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_LIMIT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
