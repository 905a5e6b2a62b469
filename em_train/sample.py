"""A model's own outputs to prompts, without labels, as a JSONL file: from a server or generated in this process.

An interrupted run is resumed: outputs in the file are not requested again, and an incomplete last line is dropped.
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

MAX_ATTEMPTS = 5  # of a request, if the server is busy or restarting
FIRST_RETRY_DELAY_S = 0.5  # doubled for each further attempt
RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)
REQUEST_TIMEOUT_S = 600
SCORING_BATCH_SIZE = 8

WriteRow = Callable[[dict[str, Any]], None]


class SampleRequest(NamedTuple):
    """One output to generate: number `sample` for this prompt."""

    prompt: Prompt
    sample: int
    seed: int


def sample(settings: SampleSettings) -> str:
    """Append every output that `settings.out` lacks; return the counts in words.

    Raises:
        InputError: if the prompts, the file, the server or the model cannot be used.
        OSError: if the file cannot be written.
    """
    assert settings.prompts is not None
    prompts = read_prompts(settings.prompts, settings.prompt_column, settings.split, settings.limit)
    done = _read_done(settings)
    requests = [
        SampleRequest(prompt, number, _output_seed(settings.seed, prompt.key, number))
        for prompt in prompts
        for number in range(settings.samples)
        if (prompt.key, number) not in done
    ]
    if requests:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        with settings.out.open("a", encoding="utf-8") as file, tqdm(total=len(requests), unit="output") as bar:

            def write_row(row: dict[str, Any]) -> None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                bar.update()

            if settings.base_url:
                asyncio.run(_sample_from_server(settings, requests, write_row))
            else:
                _sample_in_process(settings, requests, write_row)
    return f"{len(requests)} outputs to {len(prompts)} prompts were written, {len(done)} were there"


def _row(settings: SampleSettings, request: SampleRequest, output: str, **details: Any) -> dict[str, Any]:
    """Return a line of the file as a dict; the order of its fields is the file's."""
    answer = {} if request.prompt.answer is None else {"answer": request.prompt.answer}
    prompt = {"prompt": request.prompt.content, "sample": request.sample} | answer
    origin = {"model": settings.model, "temperature": settings.temperature, "seed": request.seed}
    return prompt | {"output": output} | details | origin


def _output_seed(seed: int, key: str, number: int) -> int:
    """Return the seed of one output, 31 bits; it does not depend on the other outputs or on a restart."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key} {number}".encode()).digest()[:4], "big") >> 1


def _read_done(settings: SampleSettings) -> set[tuple[str, int]]:
    """Return (prompt key, sample number) of each output in the file.

    Raises:
        InputError: if the file is not one of `em-train sample`, or if its outputs were made with other settings.
    """
    if not settings.out.is_file():
        return set()
    _drop_incomplete_line(settings.out)
    done = set()
    for place, row in read_jsonl(settings.out):
        try:
            done.add((Prompt(row["prompt"]).key, row["sample"]))
            model, temperature = row["model"], row["temperature"]
        except KeyError as error:
            raise InputError(f"--out: {settings.out}: {place}: has no {error}; is no file of em-train sample") from None
        for flag, in_file, wanted in (
            ("model", model, settings.model),
            ("temperature", temperature, settings.temperature),
        ):
            if in_file != wanted:
                raise InputError(f"--{flag}: got {wanted!r}; the outputs in {settings.out} are by {in_file!r}")
    return done


def _drop_incomplete_line(path: Path) -> None:
    """Remove a last line without a line feed, which a killed process leaves."""
    with path.open("rb+") as file:
        text = file.read()
        if text and not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)


# ---- From a server


async def _sample_from_server(settings: SampleSettings, requests: Sequence[SampleRequest], write_row: WriteRow) -> None:
    """Keep `concurrency` HTTP requests in flight and write each output when it arrives."""
    assert settings.base_url is not None
    key = settings.api_key or os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    base_url = settings.base_url.rstrip("/") + "/"
    queue = iter(requests)
    async with httpx.AsyncClient(base_url=base_url, headers=headers, timeout=REQUEST_TIMEOUT_S) as client:
        em_serve_fields = await _em_serve_fields(client, settings)

        async def work() -> None:
            for request in queue:
                write_row(await _complete(client, settings, request, em_serve_fields))

        await asyncio.gather(*(work() for _ in range(min(settings.concurrency, len(requests)))))


async def _em_serve_fields(client: httpx.AsyncClient, settings: SampleSettings) -> dict[str, Any]:
    """Return the request fields that only em-serve knows; {} for any other server, which reports no entropies.

    Raises:
        InputError: if nothing answers.
    """
    try:
        is_em_serve = (await client.get("em_inf")).status_code == 200
    except httpx.TransportError as error:
        raise InputError(f"--base-url: got {settings.base_url!r}; nothing answers there: {error}") from None
    return {"em_inf": {"method": "none", "stats": "summary"}, "return_token_ids": True} if is_em_serve else {}


async def _complete(
    client: httpx.AsyncClient, settings: SampleSettings, request: SampleRequest, em_serve_fields: dict[str, Any]
) -> dict[str, Any]:
    """Return the server's output as a row of the file."""
    limits = {"model": settings.model, "max_tokens": settings.max_tokens, "temperature": settings.temperature}
    body: dict[str, Any] = limits | {"seed": request.seed} | em_serve_fields
    route = "completions" if settings.plain else "chat/completions"
    body |= {"prompt": request.prompt.content} if settings.plain else {"messages": request.prompt.messages}
    response = await _post(client, settings, route, body)
    choice = response["choices"][0]
    text = choice["text"] if settings.plain else choice["message"]["content"]
    details = {"finish_reason": choice["finish_reason"], "tokens": response["usage"]["completion_tokens"]}
    if choice.get("token_ids"):
        details["token_ids"] = choice["token_ids"]
    if response.get("em_inf"):
        details["entropy"] = response["em_inf"][0]["entropy_before"]
    return _row(settings, request, text or "", **details)


async def _post(
    client: httpx.AsyncClient, settings: SampleSettings, route: str, body: dict[str, Any]
) -> dict[str, Any]:
    """Return the response's JSON; retry while the server is busy or restarting.

    Raises:
        InputError: if the server refuses, in its own words, or does not answer.
    """
    for attempt in range(MAX_ATTEMPTS):
        is_last = attempt == MAX_ATTEMPTS - 1
        try:
            response = await client.post(route, json=body)
        except httpx.TransportError as error:
            if is_last:
                raise InputError(f"--base-url: {settings.base_url} stopped answering: {error!r}") from None
        else:
            if response.status_code == 200:
                content: dict[str, Any] = response.json()
                return content
            if is_last or response.status_code not in RETRIED_STATUSES:
                problem = f"says {response.status_code}: {_error_message(response)}"
                raise InputError(f"--base-url: {settings.base_url} {problem}")
        await asyncio.sleep(FIRST_RETRY_DELAY_S * 2**attempt)
    raise AssertionError("unreachable")


def _error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


# ---- In this process


def _sample_in_process(settings: SampleSettings, requests: Sequence[SampleRequest], write_row: WriteRow) -> None:
    """Generate `concurrency` outputs side by side; the outputs of one batch share the first one's seed."""
    import torch

    from em_train import outputs
    from em_train.model import add_fused_head, load

    tokenizer, model = load(settings)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    add_fused_head(model)
    pad_id, eos_ids = tokenizer.pad_token_id, outputs.find_eos_ids(model, tokenizer)
    for start in range(0, len(requests), settings.concurrency):
        batch = requests[start : start + settings.concurrency]
        torch.manual_seed(batch[0].seed)
        prompts = [outputs.encode(tokenizer, request.prompt, settings.plain) for request in batch]
        generated = outputs.generate(
            model, prompts, pad_id, eos_ids, settings.max_tokens, settings.temperature, settings.concurrency
        )
        pairs = list(zip(prompts, generated, strict=True))
        for request, scored in zip(batch, outputs.score(model, pairs, pad_id, SCORING_BATCH_SIZE), strict=True):
            ids = scored.token_ids
            text = tokenizer.decode(ids, skip_special_tokens=True)
            details = {"tokens": len(ids), "token_ids": ids, "entropy": scored.entropy}
            finish_reason = "stop" if ids[-1] in eos_ids else "length"
            write_row(_row(settings, request, text, finish_reason=finish_reason, **details))
