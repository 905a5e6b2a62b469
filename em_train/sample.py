"""A model's own outputs to prompts, without labels, as a JSONL file: from a server or generated in this process.

An interrupted run is resumed: outputs in the file are not requested again, and an incomplete last line is dropped.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from em_train.prompts import InputError, Prompt, parse_prompt, read_jsonl, read_prompts
from em_train.server import Server
from em_train.settings import SampleSettings

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
        place = f"--out: {settings.out}: {place}"
        prompt = parse_prompt(row, "prompt", place)
        for field in ("sample", "model", "temperature"):
            if not isinstance(row.get(field), str | int | float):
                raise InputError(f"{place}: has no {field!r}; is no file of em-train sample")
        done.add((prompt.key, row["sample"]))
        for field, wanted in (("model", settings.model), ("temperature", settings.temperature)):
            if row[field] != wanted:
                raise InputError(f"--{field}: got {wanted!r}; the outputs in {settings.out} are by {row[field]!r}")
    return done


def _drop_incomplete_line(path: Path) -> None:
    """Remove a last line without a line feed, which a killed process leaves."""
    with path.open("rb+") as file:
        text = file.read()
        if text and not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)


async def _sample_from_server(settings: SampleSettings, requests: Sequence[SampleRequest], write_row: WriteRow) -> None:
    """Keep `concurrency` HTTP requests in flight and write each output when it arrives."""
    queue = iter(requests)
    async with Server(settings) as server:

        async def work() -> None:
            for request in queue:
                text, details = await server.complete(request.prompt, request.seed)
                write_row(_row(settings, request, text, **details))

        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(settings.concurrency, len(requests))):
                    workers.create_task(work())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None


def _sample_in_process(settings: SampleSettings, requests: Sequence[SampleRequest], write_row: WriteRow) -> None:
    """Generate `concurrency` outputs side by side; the outputs of one batch share the first one's seed."""
    import torch

    from em_train import outputs
    from em_train.fingerprint import fingerprint_of
    from em_train.model import add_fused_head, check_context_length, load

    tokenizer, model = load(settings)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    add_fused_head(model)
    pad_id, eos_ids = tokenizer.pad_token_id, outputs.find_eos_ids(model, tokenizer)
    encoded = [outputs.encode(tokenizer, request.prompt, settings.plain) for request in requests]
    check_context_length(settings, model, longest_prompt=max(map(len, encoded)))
    tokenizer_id = fingerprint_of(tokenizer)
    for start in range(0, len(requests), settings.concurrency):
        batch = requests[start : start + settings.concurrency]
        prompts = encoded[start : start + settings.concurrency]
        torch.manual_seed(batch[0].seed)
        generated = outputs.generate(
            model, prompts, pad_id, eos_ids, settings.max_tokens, settings.temperature, settings.concurrency
        )
        pairs = list(zip(prompts, generated, strict=True))
        for request, scored in zip(batch, outputs.score(model, pairs, pad_id, SCORING_BATCH_SIZE), strict=True):
            ids = scored.token_ids
            text = tokenizer.decode(ids, skip_special_tokens=True)
            details = {"tokens": len(ids), "token_ids": ids, "tokenizer": tokenizer_id, "entropy": scored.entropy}
            finish_reason = "stop" if ids[-1] in eos_ids else "length"
            write_row(_row(settings, request, text, finish_reason=finish_reason, **details))
