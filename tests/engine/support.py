"""What the engine's tests share: requests to the demo model, settings, and the check of stats by the reference."""

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import httpx
import numpy as np
import pytest

import demo
from em_sampler.params import CUT, Params, TruncationParams, parse_params
from em_sampler.stats.wire import TAIL_TOKENS
from em_sampler.transforms import reference
from tests.engine.launch import API_KEY, ROOT, Server

EXAMPLES = ROOT / "examples"
EM = {"threshold": 0.1, "steps": 12, "learning_rate": 0.3}
ADAPTIVE = {"method": "adaptive_temperature", "ratio": 0.4}
STRONG = {"threshold": 0.0, "steps": 64, "learning_rate": 10.0}  # leaves only the top token
CAPPED = {"threshold": 0.0, "steps": 7, "learning_rate": 10.0, "kl_weight": 0.0}  # the same in few steps
UNSURE = "Q"  # not in the training data: many next characters are likely
CHAT: list[Any] = [{"role": "user", "content": "58+17*3-29"}]
VOCAB_SIZE = json.loads((demo.MODEL_PATH / "config.json").read_text())["vocab_size"]
ALL_LOGPROBS = {"logprobs": VOCAB_SIZE, "return_tokens_as_token_ids": True}


async def post(client: httpx.AsyncClient, body: dict[str, Any], delay_s: float = 0.0) -> dict[str, Any]:
    """Send a completion request after `delay_s`; return the response's JSON."""
    await asyncio.sleep(delay_s)
    response = await client.post("/v1/completions", json={"model": "demo", "return_token_ids": True} | body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def complete(server: Server, *bodies: dict[str, Any], one_by_one: bool = False) -> list[dict[str, Any]]:
    """Send completion requests, one every 10 ms or each after the response to the last; return the responses' JSON."""

    async def send_all() -> list[dict[str, Any]]:
        async with server.async_http() as client:
            if one_by_one:
                return [await post(client, body) for body in bodies]
            return await asyncio.gather(*(post(client, body, 0.01 * i) for i, body in enumerate(bodies)))

    return asyncio.run(send_all())


def check_deepconf(text: str, stream: bool) -> dict[str, Any]:
    """Check that a vote was held, or was not possible, and that there is no NaN anywhere; return its outcome."""
    parts = [part.removeprefix("data: ") for part in text.strip().split("\n\n")] if stream else [text]
    objects = [json.loads(part, parse_constant=pytest.fail) for part in parts if part != "[DONE]"]
    outcome: dict[str, Any] = objects[-1]["strategy"]
    choices = [choice for each in objects for choice in each["choices"]]
    assert "".join((choice["delta"] if stream else choice["message"]).get("content") or "" for choice in choices)
    assert outcome["failed"] == 0
    assert outcome["completed"] >= 2
    assert outcome["votes"] or outcome["threshold"] is None
    return outcome


def tokens(response: dict[str, Any], choice: int = 0) -> list[int]:
    ids: list[int] = response["choices"][choice]["token_ids"]
    return ids


def logprob_rows(choice: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return the model's log-probabilities at each token of a choice, [tokens, vocab]."""
    names = [f"token_id:{token}" for token in range(VOCAB_SIZE)]
    return np.array([[row[name] for name in names] for row in choice["logprobs"]["top_logprobs"]])


def check_stats(response: dict[str, Any], em_inf: dict[str, Any], temperature: float = 1.0) -> int:
    """Check a response's stats against the reference; return the number of tokens. `temperature`: the request's."""
    count = 0
    for choice, summary in zip(response["choices"], response["em_inf"], strict=True):
        rows = logprob_rows(choice)
        per_token = summary["per_token"]
        assert summary["index"] == choice["index"]
        assert summary["tokens"] == len(per_token) == len(rows) == len(choice["token_ids"])
        assert summary["missing"] == 0
        before = [token["before"] for token in per_token]
        assert np.abs(np.array(before) - [reference.entropy(row) for row in rows]).max() < 1e-4
        params, changed = parse_params(em_inf), 0
        for row, token in zip(rows, per_token, strict=True):
            row_after, steps = reference_row(row, params, temperature)
            # So near the threshold, float32 may fall on either side of it.
            if abs(token["before"] - getattr(params, "threshold", -1)) > 1e-4:
                assert token["steps"] == max(steps, 0)
                # float32 over many steps; adam magnifies rounding
                assert abs(token["after"] - reference.entropy(row_after)) < 5e-3
                check_candidates(token.get("top", []), params.top, row, row_after)
            changed += steps == CUT or token["steps"] > 0
        assert summary["steps"] == sum(token["steps"] for token in per_token)
        assert summary["optimized_tokens"] == changed
        varentropies = [reference.varentropy(row) for row in rows]
        assert [token["varentropy"] for token in per_token] == pytest.approx(varentropies, abs=1e-3)
        assert summary["varentropy"] == pytest.approx(np.mean(varentropies), abs=1e-3)
        assert (summary["entropy_max"], before[summary["entropy_max_position"]]) == (max(before), max(before))
        assert summary["entropy_tail"] == pytest.approx(np.mean(before[-TAIL_TOKENS:]), abs=2e-6)
        assert summary["entropy_before"] == pytest.approx(np.mean(before), abs=2e-6)
        assert summary["entropy_after"] == pytest.approx(np.mean([token["after"] for token in per_token]), abs=2e-6)
        count += len(rows)
    return count


def check_candidates(
    candidates: list[dict[str, Any]], top: int, before: reference.Row, after: reference.Row, error: float = 5e-3
) -> None:
    """Check one token's candidates against its rows before and after the method; `error`: of probabilities after it."""
    assert len(candidates) == min(top, len(before))
    ids = [candidate["id"] for candidate in candidates]
    assert len(set(ids)) == len(ids)
    p_before, p_after = reference.softmax(before), reference.softmax(after)
    assert [candidate["before"] for candidate in candidates] == pytest.approx(p_before[ids], abs=1e-4)
    assert [candidate["after"] for candidate in candidates] == pytest.approx(p_after[ids], abs=error)
    listed = [(candidate["after"], candidate["before"]) for candidate in candidates]
    assert listed == sorted(listed, reverse=True) or p_before[ids] == pytest.approx(sorted(p_before[ids])[::-1])
    others = np.delete(p_after, ids)
    assert not ids or not len(others) or others.max() <= listed[-1][0] + error


def reference_row(row: reference.Row, params: Params, temperature: float = 1.0) -> tuple[reference.Row, int]:
    """Return the row after the method and the steps by the reference; CUT if it removes tokens."""
    if params.method == "em_inf":
        return reference.em_inf(row, params)
    if params.method == "adaptive_temperature":
        return row / reference.temperature(row, params), int(reference.entropy(row) > params.threshold)
    if isinstance(params, TruncationParams) and temperature > 0:
        kept = reference.kept(row, params, temperature)
        return np.where(kept, row, -np.inf), 0 if kept.all() else CUT
    return row, 0


def transformed_row(row: reference.Row, em_inf: Any, temperature: float) -> reference.Row:
    """Return `row` after the method of a request with this `em_inf` and temperature, by the reference."""
    params = parse_params(em_inf)
    return reference_row(row, params, temperature)[0] if params else row


def run_client_example(script: str, server: Server) -> str:
    """Run a script of examples/ that talks to `server`; return what it prints."""
    command = [sys.executable, str(EXAMPLES / script), "--base-url", f"{server.url}/v1"]
    env = os.environ | {"OPENAI_API_KEY": API_KEY}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
