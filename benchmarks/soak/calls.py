"""Requests to a server of the reproducers, which has a key; and what is read from it."""

from typing import Any

import httpx
import psutil

from harness.launch import Server

KEY = "reproducers"
HEADERS = {"Authorization": f"Bearer {KEY}"}
CHAT = [{"role": "user", "content": "12+7*3-4"}]
LIMIT_S = 900.0
MEBIBYTE = 2**20


def http(server: Server) -> httpx.Client:
    """Return a client of the server, with its key."""
    return httpx.Client(base_url=server.url, headers=HEADERS, timeout=LIMIT_S)


def chat(server: Server, headers: dict[str, str] | None = None, path: str = "", **fields: Any) -> httpx.Response:
    """Send a chat request and wait for the whole response."""
    body = {"model": "demo", "messages": CHAT} | fields
    with http(server) as client:
        return client.post(f"{path}/v1/chat/completions", json=body, headers=headers)


def metric(server: Server, name: str, label: str = "") -> float:
    """Return the sum of a metric's series that have `label`."""
    with http(server) as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((name + "{", name + " ")) and label in line)


def resident(server: Server) -> float:
    """Return the MiB of memory that the API server's process has."""
    return float(psutil.Process(server.pid).memory_info().rss) / MEBIBYTE
