"""Starts real vLLM processes for the tests: `em-serve` as a user would, and the offline `LLM` in a script."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from benchmarks.launch import ONE_PROCESS
from tests.ports import free_port

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
API_KEY = "test-key"
START_LIMIT = 240  # seconds; a start takes 25 to 45 on two idle cores

# float32, so that a row's logits do not depend on how many other rows are in the batch by more than 1e-6.
ENGINE_FLAGS = ("--dtype", "float32", "--max-model-len", "256", "--enable-chunked-prefill")


def environment(runner: str, **extra: str) -> dict[str, str]:
    """The environment of a vLLM process on `runner`: "v1", or "v2" under Triton's interpreter."""
    chosen = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0",
        "TRITON_INTERPRET": "1" if runner == "v2" else "0",
        "PYTHONPATH": os.pathsep.join([str(HERE / "site"), str(ROOT)]),
    }
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    return inherited | chosen | extra


@dataclass(frozen=True)
class Server:
    """A running em-serve."""

    url: str
    runner: str
    log: Path
    pid: int

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, max_retries=0, timeout=300)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, max_retries=0, timeout=300)

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=300)

    def async_http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=300)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's series with these labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        series = [line for line in lines if line.startswith((name + "{", name + " "))]
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(line.split()[-1]) for line in series if all(label in line for label in wanted))

    def memory(self) -> dict[str, int]:
        """Resident bytes of the server's process ("server") and of those below it."""
        process = psutil.Process(self.pid)
        children = {f"{child.pid} {child.cmdline()[-1]}": child for child in process.children(recursive=True)}
        return {name: each.memory_info().rss for name, each in ({"server": process} | children).items()}

    def until(self, true: Callable[[], bool], limit: float = 60) -> None:
        """Wait for what the server does after it has answered."""
        deadline = time.monotonic() + limit
        while not true():
            assert time.monotonic() < deadline, "it did not come true"
            time.sleep(0.1)


@contextlib.contextmanager
def serve(*flags: str, runner: str = "v1", executor: str = "uni", **env: str) -> Iterator[Server]:
    """em-serve with `flags` and environment variables, until the block ends; for `executor` see `started`."""
    port = free_port()
    address = ("--host", "127.0.0.1", "--port", str(port), "--api-key", API_KEY)
    with started(*flags, *address, runner=runner, executor=executor, **env) as (process, log):
        server = Server(f"http://127.0.0.1:{port}", runner, log, process.pid)
        _wait(server, process)
        yield server


@contextlib.contextmanager
def together(*servers: contextlib.AbstractContextManager[Server]) -> Iterator[list[Server]]:
    """The servers of some `serve`, which start at the same time: most of a start is imports, on one core."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        yield list(pool.map(stack.enter_context, servers))


@contextlib.contextmanager
def started(
    *flags: str, runner: str = "v1", executor: str = "uni", **env: str
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The process of an em-serve, and its log; whether it serves is not looked at.

    Args:
        executor: "uni" runs the model in the engine's process. "mp" is vLLM's default on the CPU: a process of its own,
            and both spin for each other, so that under load clients and server wait for seconds on two cores.
    """
    if executor == "uni":
        flags, env = (*flags, "--distributed-executor-backend", "uni"), ONE_PROCESS | env
    model = flags[:1] if flags and not flags[0].startswith("-") else ()  # vLLM wants it first
    log = Path(tempfile.mkstemp(prefix="em-serve-", suffix=".log")[1])
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", *model, *ENGINE_FLAGS, *flags[len(model) :]],
            env=environment(runner, **env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        _stop(process)


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"em-serve did not start:\n{server.log.read_text(errors='replace')[-4000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The server and all it started: its process group is its own."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def offline(requests: list[dict[str, Any]], runner: str, with_plugin: bool) -> list[Any]:
    """Answers of vLLM's offline `LLM` to `requests` (see offline.py): token ids, or an error's text."""
    extra = {} if with_plugin else ONE_PROCESS | {"EM_INF_HIDDEN": "1"}  # else as a user's script, in two processes
    with tempfile.TemporaryDirectory() as folder:
        inbox, outbox = Path(folder, "in.json"), Path(folder, "out.json")
        inbox.write_text(json.dumps(requests))
        command = [sys.executable, str(HERE / "offline.py"), str(inbox), str(outbox)]
        done = subprocess.run(
            command, env=environment(runner, **extra), capture_output=True, text=True, timeout=600, check=False
        )
        assert outbox.exists(), (done.stdout + done.stderr)[-4000:]
        answers: list[Any] = json.loads(outbox.read_text())
    return answers
