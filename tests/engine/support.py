"""Requests to the demo model, and the settings that the engine's tests share."""

import asyncio
import json
from typing import Any

import httpx

import demo
from tests.engine.launch import Server

EM = {"threshold": 0.1, "steps": 12, "learning_rate": 0.3}
ADAPTIVE = {"method": "adaptive_temperature", "ratio": 0.4}
STRONG = {"threshold": 0.0, "steps": 64, "learning_rate": 10.0}  # nothing but the top token is left
UNSURE = "Q"  # nothing the model was trained on: its next characters are open
CHAT: list[Any] = [{"role": "user", "content": "58+17*3-29"}]
VOCABULARY = json.loads((demo.MODEL_PATH / "config.json").read_text())["vocab_size"]


async def post(client: httpx.AsyncClient, body: dict[str, Any], delay: float = 0.0) -> dict[str, Any]:
    await asyncio.sleep(delay)
    answer = await client.post("/v1/completions", json={"model": "demo", "return_token_ids": True} | body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def complete(server: Server, *bodies: dict[str, Any], one_by_one: bool = False) -> list[dict[str, Any]]:
    """Answers to completion requests: all in flight together, entering a little after one another, or one by one."""

    async def run() -> list[dict[str, Any]]:
        async with server.async_http() as client:
            if one_by_one:
                return [await post(client, body) for body in bodies]
            return await asyncio.gather(*(post(client, body, 0.01 * i) for i, body in enumerate(bodies)))

    return asyncio.run(run())


def tokens(answer: dict[str, Any], choice: int = 0) -> list[int]:
    ids: list[int] = answer["choices"][choice]["token_ids"]
    return ids
