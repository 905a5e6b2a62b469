"""Starts em-serve, or vLLM's own server without the plugin, on a free port of 127.0.0.1 for as long as a block lasts.

The server is a session of its own with a log file; leaving the block ends all its processes.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

EM_SERVE = (sys.executable, "-m", "server.cli")
PLAIN_VLLM = (sys.executable, "-m", "benchmarks.plain_vllm")
THREADS = max(1, len(os.sched_getaffinity(0)) - 1)  # of the model on the CPU: vLLM's own choice
# The CPU build takes the executor "uni" only with the first, and then leaves the second to us.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(THREADS)}
START_LIMIT = 900  # seconds; a 7B model on CUDA compiles and captures graphs first


@dataclass(frozen=True)
class Server:
    """A server that answers at `url`; `pid` is the root of its processes."""

    url: str
    pid: int


@contextlib.contextmanager
def serve(*command: str, log: Path, executor: str = "uni") -> Iterator[Server]:
    """`command` with a port of its own appended, from when it is healthy until the block ends.

    Args:
        executor: "uni" runs the model in the engine's process, vLLM's default on one CUDA device. "mp" gives it a
            process of its own, the default on the CPU, where both spin on sched_yield for each other: on two cores
            the same load took 0.6 s or 5 s.
    """
    port = _free_port()
    flags = ("--distributed-executor-backend", executor, "--disable-uvicorn-access-log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *flags, "--host", "127.0.0.1", "--port", str(port)],
            env=_environment() | (ONE_PROCESS if executor == "uni" else {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", process.pid)
        _wait(server, process, log)
        yield server
    finally:
        _stop(process)


def busy_cores(server: Server, seconds: float) -> float:
    """How many cores the server's processes keep busy, over the next `seconds`."""
    before, start = _processor_time(server), time.perf_counter()
    time.sleep(seconds)
    return (_processor_time(server) - before) / (time.perf_counter() - start)


class Bystanders:
    """How many cores the rest of the machine kept busy since this was made: that much was not there to measure with."""

    def __init__(self, *servers: Server) -> None:
        self.servers = servers
        self.start = time.perf_counter()
        self.before = self._processor_time()

    def busy_cores(self) -> float:
        took: float = self._processor_time() - self.before
        return took / (time.perf_counter() - self.start)

    def _processor_time(self) -> float:
        everyone = psutil.cpu_times()
        ours = psutil.Process().cpu_times()
        all_but_us = everyone.user + everyone.nice + everyone.system - ours.user - ours.system
        return all_but_us - sum(_processor_time(server) for server in self.servers)


def _processor_time(server: Server) -> float:
    root = psutil.Process(server.pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _environment() -> dict[str, str]:
    """Ours, less vLLM's settings: both kinds of server start from the same."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    chosen = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM would take nearly all of the machine's memory
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # as em-serve sets it
    }
    return inherited | chosen


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
