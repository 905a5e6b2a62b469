"""Phase 1, data with no label: a model's own outputs to prompts, one JSON object a line, from a server or this process.

A run that was ended goes on where it was: what is in the file is not asked again, half a line at its end is dropped.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from tqdm import tqdm

from em_train.prompts import InputError, Prompt, read_jsonl, read_prompts
from em_train.settings import SampleSettings

ATTEMPTS, PAUSE = 5, 0.5  # of a request that meets a busy or restarting server; seconds, doubled each time
RETRIED = (408, 425, 429, 500, 502, 503, 504)
Keep = Callable[[dict[str, Any]], None]


class Wanted(NamedTuple):
    """One output to get: the `sample`-th for this prompt."""

    prompt: Prompt
    sample: int
    seed: int


def sample(settings: SampleSettings) -> str:
    """Append every output that `settings.out` lacks; returns what was done, in words.

    Raises:
        InputError: prompts, server or model are not as they have to be.
        OSError: the file cannot be written.
    """
    assert settings.prompts is not None
    prompts = read_prompts(settings.prompts, settings.prompt_column, settings.split, settings.limit)
    done = _done(settings)
    wanted = [
        Wanted(prompt, number, _seed(settings.seed, prompt.key, number))
        for prompt in prompts
        for number in range(settings.samples)
        if (prompt.key, number) not in done
    ]
    if wanted:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        with settings.out.open("a", encoding="utf-8") as file, tqdm(total=len(wanted), unit="output") as bar:

            def keep(row: dict[str, Any]) -> None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                bar.update()

            if settings.base_url:
                asyncio.run(_from_server(settings, wanted, keep))
            else:
                _in_process(settings, wanted, keep)
    return f"{len(wanted)} outputs to {len(prompts)} prompts were written, {len(done)} were there"


def _row(settings: SampleSettings, wanted: Wanted, output: str, **more: Any) -> dict[str, Any]:
    answer = {} if wanted.prompt.answer is None else {"answer": wanted.prompt.answer}
    asked = {"prompt": wanted.prompt.content, "sample": wanted.sample} | answer
    how = {"model": settings.model, "temperature": settings.temperature, "seed": wanted.seed}
    return asked | {"output": output} | more | how


def _seed(seed: int, key: str, number: int) -> int:
    """Of one output: the same whatever else is asked, before or after a restart."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key} {number}".encode()).digest()[:4], "big") >> 1


def _done(settings: SampleSettings) -> set[tuple[str, int]]:
    """What the file has already."""
    if not settings.out.is_file():
        return set()
    _drop_half_a_line(settings.out)
    done = set()
    for where, row in read_jsonl(settings.out):
        try:
            done.add((Prompt(row["prompt"]).key, row["sample"]))
            model, temperature = row["model"], row["temperature"]
        except KeyError as error:
            raise InputError(f"--out: {settings.out}: {where}: has no {error}; is no file of em-train sample") from None
        for flag, there, asked in (
            ("model", model, settings.model),
            ("temperature", temperature, settings.temperature),
        ):
            if there != asked:
                raise InputError(f"--{flag}: got {asked!r}; the outputs in {settings.out} are by {there!r}")
    return done


def _drop_half_a_line(path: Path) -> None:
    """What a process that was killed while it wrote has left behind the last line's end."""
    with path.open("rb+") as file:
        text = file.read()
        if text and not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)


# ---- From a server


async def _from_server(settings: SampleSettings, wanted: Sequence[Wanted], keep: Keep) -> None:
    """`concurrency` requests at a time, each kept as it comes."""
    assert settings.base_url is not None
    key = settings.api_key or os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    left = iter(wanted)
    async with httpx.AsyncClient(base_url=settings.base_url.rstrip("/") + "/", headers=headers, timeout=600) as client:
        extra = await _extra(client, settings)

        async def ask_on() -> None:
            for each in left:
                keep(await _one(client, settings, each, extra))

        await asyncio.gather(*(ask_on() for _ in range(min(settings.concurrency, len(wanted)))))


async def _extra(client: httpx.AsyncClient, settings: SampleSettings) -> dict[str, Any]:
    """Fields that only em-serve knows; any other OpenAI-compatible server reports no entropies."""
    try:
        known = (await client.get("em_inf")).status_code == 200
    except httpx.TransportError as error:
        raise InputError(f"--base-url: got {settings.base_url!r}; nothing answers there: {error}") from None
    return {"em_inf": {"method": "none", "stats": "summary"}, "return_token_ids": True} if known else {}


async def _one(
    client: httpx.AsyncClient, settings: SampleSettings, wanted: Wanted, extra: dict[str, Any]
) -> dict[str, Any]:
    limits = {"model": settings.model, "max_tokens": settings.max_tokens, "temperature": settings.temperature}
    body: dict[str, Any] = limits | {"seed": wanted.seed} | extra
    route = "completions" if settings.plain else "chat/completions"
    body |= {"prompt": wanted.prompt.content} if settings.plain else {"messages": wanted.prompt.messages}
    answer = await _post(client, settings, route, body)
    choice = answer["choices"][0]
    text = choice["text"] if settings.plain else choice["message"]["content"]
    more = {"finish_reason": choice["finish_reason"], "tokens": answer["usage"]["completion_tokens"]}
    if choice.get("token_ids"):
        more["token_ids"] = choice["token_ids"]
    if answer.get("em_inf"):
        more["entropy"] = answer["em_inf"][0]["entropy_before"]
    return _row(settings, wanted, text or "", **more)


async def _post(
    client: httpx.AsyncClient, settings: SampleSettings, route: str, body: dict[str, Any]
) -> dict[str, Any]:
    for attempt in range(ATTEMPTS):
        last = attempt == ATTEMPTS - 1
        try:
            reply = await client.post(route, json=body)
        except httpx.TransportError as error:
            if last:
                raise InputError(f"--base-url: {settings.base_url} stopped answering: {error!r}") from None
        else:
            if reply.status_code == 200:
                answer: dict[str, Any] = reply.json()
                return answer
            if last or reply.status_code not in RETRIED:
                raise InputError(f"--base-url: {settings.base_url} says {reply.status_code}: {_reason(reply)}")
        await asyncio.sleep(PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def _reason(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return reply.text[:200]


# ---- In this process


def _in_process(settings: SampleSettings, wanted: Sequence[Wanted], keep: Keep) -> None:
    import torch

    from em_train import outputs
    from em_train.run import load

    tokenizer, model = load(settings)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    outputs.fuse(model)
    pad, ends = tokenizer.pad_token_id, outputs.end_tokens(model, tokenizer)
    for start in range(0, len(wanted), settings.concurrency):
        some = wanted[start : start + settings.concurrency]
        torch.manual_seed(some[0].seed)
        prompts = [outputs.encode(tokenizer, each.prompt, settings.plain) for each in some]
        drawn = outputs.draw(model, prompts, pad, ends, settings.max_tokens, settings.temperature, settings.concurrency)
        for each, scored in zip(
            some, outputs.score(model, list(zip(prompts, drawn, strict=True)), pad, 8), strict=True
        ):
            ids = scored.token_ids
            more = {"tokens": len(ids), "token_ids": ids, "entropy": scored.entropy}
            reason = "stop" if ids[-1] in ends else "length"
            keep(_row(settings, each, tokenizer.decode(ids, skip_special_tokens=True), finish_reason=reason, **more))
