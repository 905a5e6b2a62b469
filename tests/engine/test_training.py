"""em-train with em-serve: outputs sampled from a running server, and a server of a trained model."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import demo
from em_train import outputs
from em_train.fingerprint import fingerprint_of
from em_train.model import add_fused_head
from em_train.prompts import InputError, Prompt
from em_train.sample import sample
from em_train.settings import SampleSettings, validate
from tests.em_train.support import ft, rl, train, write_prompts
from tests.engine.launch import API_KEY, Server, serve

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", 16)


def settings(server: Server, prompts: Path, out: Path, **more: Any) -> SampleSettings:
    given = {"model": "demo", "base_url": f"{server.url}/v1", "api_key": API_KEY, "max_tokens": 96, "concurrency": 4}
    return validate(SampleSettings, given | {"prompts": str(prompts), "out": out} | more)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_servers_outputs_are_the_models_with_the_entropies_it_reports(v1: Server, prompts: Path, tmp_path: Path):
    out = tmp_path / "o.jsonl"
    assert sample(settings(v1, prompts, out)) == "16 outputs to 16 prompts were written, 0 were there"
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH, dtype=torch.float32).eval()
    add_fused_head(model)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    found = rows(out)
    assert {row["prompt"] for row in found} == {row["prompt"] for row in rows(prompts)}
    pairs = [(outputs.encode(tokenizer, Prompt(row["prompt"])), row["token_ids"]) for row in found]
    for row, scored in zip(found, outputs.score(model, pairs, pad_id=0, batch_size=16), strict=True):
        assert row["output"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert row["entropy"] == pytest.approx(scored.entropy, abs=1e-4)
        assert row["tokenizer"] == fingerprint_of(tokenizer)
    again = tmp_path / "again.jsonl"  # resumed after an interruption: each output has its seed, so the same come out
    again.write_text("".join(line + "\n" for line in out.read_text().splitlines()[:5]) + '{"prompt": "ha')
    assert sample(settings(v1, prompts, again, concurrency=2)) == "11 outputs to 16 prompts were written, 5 were there"
    assert {row["prompt"]: row["output"] for row in rows(again)} == {row["prompt"]: row["output"] for row in found}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "nobody"}, "says 404: .*nobody"),
        ({"api_key": "wrong"}, "says 401"),
        ({"max_tokens": 5000}, "says 400: .*max_tokens"),
    ],
)
def test_an_error_repeats_what_the_server_answered(
    more: dict[str, Any], message: str, v1: Server, prompts: Path, tmp_path: Path
):
    with pytest.raises(InputError, match=message):
        sample(settings(v1, prompts, tmp_path / "o.jsonl", **more))


def test_full_weights_and_an_adapter_on_them_are_served(prompts: Path, tmp_path: Path):
    """EM-FT on all weights, then EM-RL as an adapter on the result: one server serves both, with em_inf."""
    full, adapter = tmp_path / "full", tmp_path / "adapter"
    train(ft(prompts=str(prompts), out=full, fresh_every=1, learning_rate=1e-3))
    train(rl(model=str(full), prompts=str(prompts), out=adapter, lora_rank=8, learning_rate=1e-2))
    flags = (str(full), "--served-model-name", "full", "--enable-lora", "--lora-modules", f"em={adapter}")
    asked = [row["prompt"] for row in rows(prompts)]
    with serve(*flags) as server:
        served = {name: [ask(server, name, prompt) for prompt in asked] for name in ("full", "em")}
        strong = {"temperature": 1.5, "em_inf": {"threshold": 0.0, "steps": 64, "learning_rate": 10.0}}
        minimised = [ask(server, "em", prompt, **strong) for prompt in asked[:4]]
    assert served == {"full": greedy(full, asked), "em": greedy(full, asked, adapter)}
    assert minimised == served["em"][:4]
    untrained = greedy(demo.MODEL_PATH, asked)
    assert served["full"] != untrained and served["em"] != served["full"], "training has changed no reply"


def ask(server: Server, model: str, prompt: str, **more: Any) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 60, "temperature": 0}
    reply: httpx.Response = server.http.post("/v1/chat/completions", json=body | more)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def greedy(model: Path, asked: list[str], adapter: Path | None = None) -> list[str]:
    """Return the greedy replies of transformers' `generate`."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter).eval()
    ids = [outputs.encode(tokenizer, Prompt(prompt)) for prompt in asked]
    drawn = outputs.generate(loaded, ids, tokenizer.pad_token_id, [tokenizer.eos_token_id], 60, 0.0, len(ids))
    return tokenizer.batch_decode(drawn, skip_special_tokens=True)
