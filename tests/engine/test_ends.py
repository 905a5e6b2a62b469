"""How servers end: cut off by SIGTERM, with a dead engine, killed. Each test ends its own server, so it comes last."""

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from harness.launch import EM_SERVE, Server, serve, together
from server.auth import OPEN_ROUTES
from tests.engine.launch import HANG_LIMIT_S, runner_variables

pytestmark = pytest.mark.engine

LONG: dict[str, Any] = {"model": "demo", "prompt": "1+1=", "max_tokens": 900, "ignore_eos": True, "n": 16}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    folder = tmp_path_factory.mktemp("ends")
    (folder / "keys").write_text("# first\nfirst\n")
    flags = {
        "cut off": ("--api-key-file", str(folder / "keys"), "--root-path", "/", "--enable-chunked-prefill"),
        "engine dies": ("--max-logprobs", "1000"),
        "killed": (),
        "several": ("--api-server-count", "2"),
    }
    env = runner_variables("v1")
    starts = [
        serve(*EM_SERVE, *own, log=folder / f"{name}.log", executor="mp" if name == "killed" else "uni", env=env)
        for name, own in flags.items()
    ]
    with together(*starts) as running:
        yield dict(zip(flags, running, strict=True))


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


def ended(processes: list[psutil.Process]) -> None:
    """Wait until none of `processes` is left."""
    deadline = time.monotonic() + HANG_LIMIT_S
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.2)


def test_every_route_of_the_app_needs_the_key_but_the_open_ones(servers: dict[str, Server]) -> None:
    server = servers["cut off"]
    listed = re.findall(r"Route: (\S+), (?:Methods: (.+)|Endpoint: .+)", server.log.read_text())
    routes = [(path, method.strip()) for path, methods in listed for method in (methods or "GET").split(",")]
    assert {"/invocations", "/tokenize", "/v1/em_inf", "/openapi.json"} <= {path for path, _ in routes}
    opened = set()
    for path, method in routes:
        status = httpx.request(method, server.url + re.sub(r"{.*?}", "1", path), timeout=HANG_LIMIT_S).status_code
        if status != 401:
            opened.add((path, method))
    assert {path for path, _ in opened} == OPEN_ROUTES - {"/metrics"}  # a mount: not listed
    assert {method for _, method in opened} <= {"GET", "HEAD"}
    assert httpx.get(f"{server.url}/metrics").status_code == 200


def test_keys_rotate_without_a_restart_and_sighup_ends_nothing(servers: dict[str, Server], tmp_path: Path) -> None:
    server = servers["cut off"]
    (file,) = (Path(argument) for argument in psutil.Process(server.pid).cmdline() if argument.endswith("/keys"))

    def statuses() -> list[int]:
        return [httpx.get(f"{server.url}/v1/models", headers=key(name)).status_code for name in ("first", "second")]

    assert statuses() == [200, 401]
    file.write_text("second\n")
    for process in server.processes():
        process.send_signal(signal.SIGHUP)
    assert statuses() == [401, 200]
    file.write_text("first\n")
    assert statuses() == [200, 401]


def test_a_seed_is_refused_beside_chunked_prefill(servers: dict[str, Server]) -> None:
    server = servers["cut off"]
    body = {"model": "demo", "prompt": "1", "max_tokens": 1}
    refused = httpx.post(f"{server.url}/v1/completions", json=body | {"seed": 1}, headers=key("first"), timeout=60)
    assert refused.status_code == 400
    assert "seed: got 1; must be left out" in refused.json()["error"]["message"]
    answered = httpx.post(f"{server.url}/v1/completions", json=body, headers=key("first"), timeout=60)
    assert answered.status_code == 200


def test_more_logprobs_than_the_vocabulary_are_refused(servers: dict[str, Server]) -> None:
    body = {"model": "demo", "prompt": "1", "max_tokens": 1, "seed": 1}
    url = f"{servers['engine dies'].url}/v1/completions"
    assert httpx.post(url, json=body | {"logprobs": 1000}, timeout=60).status_code == 400
    assert httpx.post(url, json=body | {"logprobs": 5}, timeout=60).status_code == 200


def test_sigterm_cuts_off_what_runs_and_the_server_ends(servers: dict[str, Server]) -> None:
    server = servers["cut off"]
    processes = server.processes()

    async def run() -> None:
        timeout, url = HANG_LIMIT_S, f"{server.url}/v1/completions"
        async with httpx.AsyncClient(timeout=timeout, headers=key("first")) as http:
            whole = asyncio.create_task(http.post(url, json=LONG))
            async with http.stream("POST", url, json=LONG | {"stream": True}) as stream:
                lines = stream.aiter_lines()
                assert (await anext(lines)).startswith("data: ")
                os.kill(server.pid, signal.SIGTERM)
                received = [line async for line in lines if line]
            assert received[-1] == "data: [DONE]"
            assert '"code": 503' in received[-2]
            reply = await whole
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, 503)

    asyncio.run(run())
    assert psutil.Process(server.pid).wait(HANG_LIMIT_S) == 0
    ended(processes)


def test_a_server_whose_engine_died_ends_with_1(servers: dict[str, Server]) -> None:
    server = servers["engine dies"]
    main, *others = server.processes()
    engine = next(process for process in others if "EngineCore" in " ".join(process.cmdline()))
    engine.kill()
    assert main.wait(HANG_LIMIT_S) == 1
    ended(others)


def test_processes_end_with_the_api_server(servers: dict[str, Server]) -> None:
    main, *others = servers["killed"].processes()
    assert len(others) > 1
    main.kill()
    ended(others)


def test_one_of_several_api_servers_that_is_killed_ends_them_all(servers: dict[str, Server]) -> None:
    main, *others = servers["several"].processes()
    one = next(process for process in others if "APIServer" in " ".join(process.cmdline()))
    one.kill()
    assert main.wait(HANG_LIMIT_S) != 0
    ended(others)
