"""Requests to the demo model, and the settings that the engine's tests share."""

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest

import demo
from em_sampler.params import parse_params
from em_sampler.transforms import reference
from tests.engine.launch import Server

EM = {"threshold": 0.1, "steps": 12, "learning_rate": 0.3}
ADAPTIVE = {"method": "adaptive_temperature", "ratio": 0.4}
STRONG = {"threshold": 0.0, "steps": 64, "learning_rate": 10.0}  # nothing but the top token is left
CAPPED = {"threshold": 0.0, "steps": 7, "learning_rate": 10.0, "kl_weight": 0.0}  # the same in few steps
UNSURE = "Q"  # nothing the model was trained on: its next characters are open
CHAT: list[Any] = [{"role": "user", "content": "58+17*3-29"}]
VOCABULARY = json.loads((demo.MODEL_PATH / "config.json").read_text())["vocab_size"]
ALL_LOGPROBS = {"logprobs": VOCABULARY, "return_tokens_as_token_ids": True}


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


def rows_of(choice: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The model's log-probabilities at each token of a choice, [tokens, vocab]."""
    names = [f"token_id:{token}" for token in range(VOCABULARY)]
    return np.array([[row[name] for name in names] for row in choice["logprobs"]["top_logprobs"]])


def check(answer: dict[str, Any], em_inf: dict[str, Any]) -> int:
    """Hold every token of an answer's choices to the oracle; returns how many there were."""
    count = 0
    for choice, entry in zip(answer["choices"], answer["em_inf"], strict=True):
        rows = rows_of(choice)
        per_token = entry["per_token"]
        assert entry["index"] == choice["index"]
        assert entry["tokens"] == len(per_token) == len(rows) == len(choice["token_ids"])
        assert entry["missing"] == 0
        before = [token["before"] for token in per_token]
        assert np.abs(np.array(before) - [reference.entropy(row) for row in rows]).max() < 1e-4
        params = parse_params(em_inf)
        for row, token in zip(rows, per_token, strict=True):
            after, steps = transformed(row, params)
            if abs(token["before"] - getattr(params, "threshold", -1)) > 1e-4:  # else either side of it is right
                assert token["steps"] == steps
                assert abs(token["after"] - after) < 5e-3  # float32 and as many steps; adam magnifies rounding
        assert entry["steps"] == sum(token["steps"] for token in per_token)
        assert entry["optimized_tokens"] == sum(token["steps"] > 0 for token in per_token)
        assert entry["entropy_before"] == pytest.approx(np.mean(before), abs=2e-6)
        assert entry["entropy_after"] == pytest.approx(np.mean([token["after"] for token in per_token]), abs=2e-6)
        count += len(rows)
    return count


def transformed(row: reference.Row, params: Any) -> tuple[float, int]:
    """Entropy and steps of the oracle."""
    if params.method == "em_inf":
        changed, steps = reference.em_inf(row, params)
        return reference.entropy(changed), steps
    if params.method == "adaptive_temperature":
        return reference.entropy(row / reference.temperature(row, params)), int(
            reference.entropy(row) > params.threshold
        )
    return reference.entropy(row), 0
