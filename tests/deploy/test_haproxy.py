"""deploy/haproxy on a real HAProxy with three stand-ins for replicas: what passes, and what is sent again."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from harness.ports import free_port
from tests.deploy.manifests import DEPLOY

HAPROXY = shutil.which("haproxy", path=Path(sys.executable).parent) or shutil.which("haproxy")
HANG_LIMIT_S = 60

pytestmark = pytest.mark.skipif(not HAPROXY, reason="no haproxy: see scripts/test-tools.sh")

# Arguments: port, file. Ends without an answer at a body with "poison"; while the file exists, POST answers 503.
REPLICA = """
import os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self): self.answer(200)
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if b"poison" in body: os._exit(1)
        self.answer(503 if os.path.exists(sys.argv[2]) else 200)
    def answer(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.send_header("X-Replica", sys.argv[1])
        self.end_headers()
    def log_message(self, *_): pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@dataclass
class Balanced:
    """A running HAProxy and its replicas."""

    url: str
    replicas: list[subprocess.Popen[bytes]]
    folder: Path

    def post(self, path: str, content: bytes = b"{}") -> httpx.Response:
        return httpx.post(self.url + path, content=content, timeout=HANG_LIMIT_S, trust_env=False)


def is_up(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    return False


@pytest.fixture
def balanced(tmp_path: Path) -> Iterator[Balanced]:
    with contextlib.ExitStack() as stack:

        def start(*command: str, **environment: str) -> subprocess.Popen[bytes]:
            log = stack.enter_context((tmp_path / "log").open("ab"))
            process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
            stack.callback(process.wait, HANG_LIMIT_S)
            stack.callback(process.kill)
            return process

        ports = [free_port() for _ in range(3)]
        replicas = [
            start(sys.executable, "-c", REPLICA, str(port), str(tmp_path / f"draining-{number}"))
            for number, port in enumerate(ports)
        ]
        addresses = {f"REPLICA_{number}": f"127.0.0.1:{port}" for number, port in enumerate(ports, 1)}
        url = f"http://127.0.0.1:{free_port()}"
        wait_until_up(*(f"http://{address}" for address in addresses.values()))
        config = str(DEPLOY / "haproxy/haproxy.cfg")
        start(str(HAPROXY), "-db", "-f", config, LISTEN=url.removeprefix("http://"), **addresses)
        wait_until_up(f"{url}/health/ready")
        yield Balanced(url, replicas, tmp_path)


def wait_until_up(*urls: str) -> None:
    until = time.monotonic() + HANG_LIMIT_S
    while not all(map(is_up, urls)):
        assert time.monotonic() < until, "does not start"
        time.sleep(0.05)


def test_the_api_and_the_probes_pass_and_nothing_else(balanced: Balanced):
    for path in ("/v1/chat/completions", "/v1/models", "/v1/em_inf", "/health", "/health/live", "/health/ready"):
        assert balanced.post(path).status_code == 200, path
    for path in (
        *("/", "/metrics", "/docs", "/openapi.json", "/invocations", "/ping", "/tokenize", "/v1", "//v1/models"),
        *("/pooling", "/inference/v1/generate", "/health/", "/v1x/models", "/v1/load_lora_adapter"),
        *("/%2e/v1/models", "/sleep", "/server_info", "/V1/models"),
    ):
        response = balanced.post(path)
        assert response.status_code == 404 and "x-replica" not in response.headers, path


def test_a_body_above_the_limit_reaches_no_replica(balanced: Balanced):
    limit = 16 * 2**20
    assert balanced.post("/v1/completions", b" " * limit).status_code == 200
    response = balanced.post("/v1/completions", b" " * (limit + 1))
    assert response.status_code == 413 and "x-replica" not in response.headers


def test_a_request_that_ends_a_replica_is_not_sent_to_the_next(balanced: Balanced):
    assert balanced.post("/v1/completions", b"poison").status_code == 502
    for path in ("/v1/completions", "/v1/chat/completions") * 3:  # one of them meets the port of the dead replica
        assert balanced.post(path).status_code == 200
    assert sorted(replica.poll() is None for replica in balanced.replicas) == [False, True, True]


def test_a_request_that_a_draining_replica_refuses_is_sent_to_the_next(balanced: Balanced):
    (balanced.folder / "draining-0").touch()
    (balanced.folder / "draining-1").touch()
    for _ in range(6):
        assert balanced.post("/v1/completions").status_code == 200
    (balanced.folder / "draining-2").touch()
    assert balanced.post("/v1/completions").status_code == 503
