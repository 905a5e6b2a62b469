"""What the engine's tests add to harness/launch.py: the choice of vLLM's runner, an API key, clients, and `LLM`."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai

import demo
from harness import launch
from harness.launch import ONE_PROCESS, START_LIMIT_S, STOCK_VLLM
from server.cli import DEMO_FLAGS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
API_KEY = "test-key"
PATIENT_SERVER = (sys.executable, "-m", "tests.engine.patient_server")
HANG_LIMIT_S = 300  # of each wait: a slow machine stays far below it

# float32, so that a row's logits do not depend on how many other rows are in the batch by more than 1e-6.
ENGINE_FLAGS = ("--dtype", "float32", "--max-model-len", "256", "--enable-chunked-prefill")


def runner_variables(runner: str) -> dict[str, str]:
    """Return the variables that choose `runner`: "v1", or "v2" under Triton's interpreter (site/sitecustomize.py)."""
    return {
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0",
        "TRITON_INTERPRET": "1" if runner == "v2" else "0",
        "PYTHONPATH": os.pathsep.join([str(HERE / "site"), str(ROOT)]),
    }


def environment(runner: str, **extra: str) -> dict[str, str]:
    """Return the environment of a vLLM process on `runner`, with `extra` variables."""
    return launch.environment() | runner_variables(runner) | extra


@dataclass(frozen=True)
class Server(launch.Server):
    """A running em-serve, or a server of vLLM's own, on one of vLLM's runners."""

    runner: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, max_retries=0, timeout=HANG_LIMIT_S)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, max_retries=0, timeout=HANG_LIMIT_S)

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=HANG_LIMIT_S)

    def async_http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=HANG_LIMIT_S
        )

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's series that have these labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=HANG_LIMIT_S).text.splitlines()
        series = [line for line in lines if line.startswith((name + "{", name + " "))]
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(line.split()[-1]) for line in series if all(label in line for label in wanted))

    def memory(self) -> dict[str, int]:
        """Return resident bytes: of the server's main process ("server"), and of each process below it."""
        server, *children = self.processes()
        named = {"server": server} | {f"{child.pid} {child.cmdline()[-1]}": child for child in children}
        return {name: process.memory_info().rss for name, process in named.items()}

    def until(self, true: Callable[[], bool]) -> None:
        """Wait for something that the server does after its response."""
        deadline = time.monotonic() + HANG_LIMIT_S
        while not true():
            assert time.monotonic() < deadline, "it did not come true"
            time.sleep(0.1)


@contextlib.contextmanager
def serve(*flags: str, runner: str = "v1", executor: str = "uni", **env: str) -> Iterator[Server]:
    """Run em-serve with `flags` and environment variables until the block ends; `executor`: see harness/launch.py."""
    command, log, variables = _em_serve(flags), _log_file(), runner_variables(runner) | env
    with launch.serve(*command, "--api-key", API_KEY, log=log, executor=executor, env=variables) as server:
        yield Server(server.url, server.log, server.pid, runner)


@contextlib.contextmanager
def serve_stock(*flags: str, executor: str = "uni", **env: str) -> Iterator[Server]:
    """Run vLLM's own server on the demo model until the block ends, with the plugin and without em-serve."""
    command = (*STOCK_VLLM, str(demo.MODEL_PATH), *DEMO_FLAGS, *ENGINE_FLAGS, *flags, "--api-key", API_KEY)
    variables = runner_variables("v1") | env
    with launch.serve(*command, log=_log_file(), executor=executor, env=variables) as server:
        yield Server(server.url, server.log, server.pid, "v1")


@contextlib.contextmanager
def started(*flags: str, runner: str = "v1", executor: str = "uni", **env: str) -> Iterator[None]:
    """Run em-serve with `flags` until the block ends, without waiting until it serves: a headless one never does."""
    variables = runner_variables(runner) | env
    with launch.started(*_em_serve(flags), log=_log_file(), executor=executor, env=variables):
        yield


def _em_serve(flags: tuple[str, ...]) -> list[str]:
    model = flags[:1] if flags and not flags[0].startswith("-") else ()  # vLLM wants it first
    return [*PATIENT_SERVER, *model, *ENGINE_FLAGS, *flags[len(model) :]]


def _log_file() -> Path:
    with tempfile.NamedTemporaryFile(prefix="em-serve-", suffix=".log", delete=False) as file:
        return Path(file.name)


def offline(requests: list[dict[str, Any]], runner: str, script: Path | None = None) -> tuple[list[Any], str]:
    """Return what vLLM's offline `LLM` answers to `requests` (see offline.py), and what was printed.

    Without `script`, a `LLM` without the plugin answers, in one process. With it, the script runs as a user runs it,
    then its `llm` answers.
    """
    extra = {} if script else ONE_PROCESS | {"EM_INF_HIDDEN": "1"}
    with tempfile.TemporaryDirectory() as folder:
        inbox, outbox = Path(folder, "in.json"), Path(folder, "out.json")
        inbox.write_text(json.dumps(requests))
        command = [
            sys.executable,
            str(HERE / "offline.py"),
            str(inbox),
            str(outbox),
            *([str(script)] if script else []),
        ]
        done = subprocess.run(
            command,
            env=environment(runner, **extra),
            capture_output=True,
            text=True,
            timeout=START_LIMIT_S,
            check=False,
        )
        assert outbox.exists(), (done.stdout + done.stderr)[-4000:]
        answers: list[Any] = json.loads(outbox.read_text())
    return answers, done.stdout


def full_logprobs(model: Path, prompts: list[list[int]], last: int) -> np.ndarray[Any, Any]:
    """Return vLLM's log-probabilities of all words at the last tokens of `prompts`, [prompts * last, vocab]."""
    with tempfile.TemporaryDirectory() as folder:
        inbox, outbox = Path(folder, "in.json"), Path(folder, "out.npy")
        inbox.write_text(json.dumps(prompts))
        command = [sys.executable, str(HERE / "full_logprobs.py"), str(model), str(inbox), str(last), str(outbox)]
        env = environment("v1", **ONE_PROCESS, EM_INF_HIDDEN="1")
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=START_LIMIT_S, check=False)
        assert outbox.exists(), (done.stdout + done.stderr)[-4000:]
        rows: np.ndarray[Any, Any] = np.load(outbox)
    return rows
