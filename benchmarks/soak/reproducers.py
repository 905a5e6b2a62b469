"""Faults that were found, each with the requests that show it: `python -m benchmarks.soak.reproducers [NAME...]`.

Prints one line of figures for each; all of them need five starts of em-serve on the demo model. They judge nothing:
run them on two commits and compare. What each figure was and is: docs/findings/hardening.md.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import psutil

import demo
from benchmarks.soak.calls import CHAT, HEADERS, KEY, LIMIT_S, chat, http, metric
from benchmarks.soak.exchange import until
from benchmarks.soak.hangs import (
    STATISTICS_ADDRESS,
    flood_of_statistics,
    huge_objects,
    many_log_probabilities,
    slow_pattern,
    statistics_without_end,
    worst_validations,
)
from harness import launch
from harness.launch import EM_SERVE, Server

FOLDER = Path("build/soak")
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Reproducer = Callable[[Server], str]


@dataclass(frozen=True)
class Group:
    """Reproducers that share a server."""

    flags: Callable[[], tuple[str, ...]]
    reproducers: tuple[Reproducer, ...]
    env: tuple[tuple[str, str], ...] = ()


def masked_confidence(server: Server) -> str:
    """Let deepconf see candidates that a grammar has masked."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    fields: dict[str, Any] = {"max_tokens": 20, "temperature": 2, "structured_outputs": {"json": schema}}
    strategy = {"type": "deepconf", "n": 3, "warmup": 1}
    return _whole_and_streamed(server, strategy=strategy, **fields)


def masked_confidence_of_processed(server: Server) -> str:
    """Let deepconf see candidates that top-p has cut, on a server that returns processed log-probabilities."""
    strategy = {"type": "deepconf", "n": 4, "warmup": 2, "window": 8}
    cuts: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.1}]
    return " | ".join(_whole_and_streamed(server, "/llm", strategy=strategy, temperature=1, **cut) for cut in cuts)


def _whole_and_streamed(server: Server, path: str = "", **fields: Any) -> str:
    whole = chat(server, path=path, **fields)
    lines = chat(server, path=path, stream=True, **fields).text.splitlines()
    not_json = sum("NaN" in line or "Infinity" in line for line in lines)
    errors = sum(line.startswith('data: {"error"') for line in lines)
    return f"status {whole.status_code}; streamed: {not_json} chunks that are no JSON, {errors} errors"


def mistake_in_stream(server: Server) -> str:
    """Make a client's mistake that vLLM tells only inside the stream."""
    names = ("failed", "rejected")
    before = [metric(server, "em_inf_requests_total", f'outcome="{name}"') for name in names]
    chat(server, stream=True, stop_token_ids=[1_000_000_000], em_inf=True)
    after = [metric(server, "em_inf_requests_total", f'outcome="{name}"') for name in names]
    return ", ".join(f"{name} {new - old:+.0f}" for name, old, new in zip(names, before, after, strict=True))


def equal_request_ids(server: Server) -> str:
    """Send four votes with one request id, and a plain request beside a vote."""
    vote: dict[str, Any] = {"type": "self_consistency", "n": 6, "early_stop": True, "confidence": 0.7}
    same: dict[str, Any] = {"X-Request-Id": "trace-1"}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sent = [pool.submit(chat, server, same, strategy=vote, temperature=1, seed=i * 100) for i in range(4)]
        failed = [each.result().json()["strategy"]["failed"] for each in sent]
        cut_off = 0
        for attempt in range(3):
            votes = pool.submit(chat, server, {"X-Request-Id": "dup"}, strategy=vote | {"n": 8}, temperature=1)
            fields: dict[str, Any] = {"ignore_eos": True, "max_tokens": 600, "temperature": 1, "seed": attempt}
            plain = chat(server, {"X-Request-Id": "dup-7"}, **fields)
            cut_off += plain.json()["choices"][0]["finish_reason"] == "abort"
            votes.result()
    return f"branches failed in four votes with one id: {failed}; plain requests cut off: {cut_off} of 3"


def usage_of_stream_helper(server: Server) -> str:
    """Read a stream with the helper of OpenAI's client, which keeps the last chunk's usage."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=LIMIT_S)
    extras: dict[str, Any] = {
        "plain": {},
        "stats": {"em_inf": {"stats": "summary"}},
        "vote": {"strategy": {"type": "self_consistency", "n": 2}},
    }
    found = []
    for name, extra in extras.items():
        messages: Any = CHAT
        options: Any = {"include_usage": True}
        with client.chat.completions.stream(
            model="demo", messages=messages, temperature=1, stream_options=options, extra_body=extra
        ) as stream:
            usage = stream.get_final_completion().usage
        found.append(f"{name}: {'usage' if usage else 'no usage'}")
    return ", ".join(found)


def refinement_after_prefill(server: Server) -> str:
    """Let refinement continue a reply that the client began."""
    messages = [{"role": "user", "content": "7*3"}, {"role": "assistant", "content": "7*3="}]
    flags: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    body: dict[str, Any] = {"messages": messages, "strategy": {"type": "refinement", "rounds": 2}, "temperature": 0}
    answer = chat(server, **body, **flags)
    parsed = answer.json()
    message = parsed["choices"][0]["message"]["content"] if answer.status_code == 200 else parsed["error"]["message"]
    prompt_tokens = parsed.get("usage", {}).get("prompt_tokens")
    return f"status {answer.status_code}, {prompt_tokens} prompt tokens in both rounds, {message!r}"


def open_routes(server: Server) -> str:
    """Ask every POST route without a key."""
    routes = httpx.get(f"{server.url}/openapi.json", headers=HEADERS, timeout=LIMIT_S).json()["paths"]
    posts = [path for path, methods in routes.items() if "post" in methods and "{" not in path]
    statuses = {path: httpx.post(server.url + path, json={}, timeout=LIMIT_S).status_code for path in posts}
    works = httpx.post(f"{server.url}/invocations", json={"model": "demo", "messages": CHAT}, timeout=LIMIT_S)
    unguarded = sorted(path for path, status in statuses.items() if status != 401)
    return f"/invocations: {works.status_code}; not 401 without a key: {', '.join(unguarded) or 'none'}"


def statistics_below_a_root_path(server: Server) -> str:
    """Ask for the statistics of three prompts by the prefix that a proxy forwards."""
    body = {"model": "demo", "prompt": ["1+1=", "2+2=", "3+3="], "max_tokens": 4, "em_inf": {"stats": "summary"}}
    with http(server) as client:
        summaries = client.post("/llm/v1/completions", json=body | {"ignore_eos": True}).json()["em_inf"]
    return f"(index, tokens): {[(each['index'], each['tokens']) for each in summaries]}"


def slow_reader(server: Server) -> str:
    """Take all places by a stream that is never read; ask how long others are refused after its branches ended."""
    strategy = {"type": "self_consistency", "n": 4}
    body = {"model": "demo", "messages": CHAT, "stream": True, "strategy": strategy, "temperature": 1}
    # Larger than what the kernel holds for a socket, so that the last byte is not sent.
    body |= {"max_tokens": 990, "ignore_eos": True, "logprobs": True, "top_logprobs": 100}
    with unread(server, body, "/llm"):
        until(lambda: metric(server, "em_inf_strategy_branches_running") > 0, 60)
        until(lambda: metric(server, "em_inf_strategy_branches_running") == 0, 120)
        idle = time.monotonic()
        small: dict[str, Any] = {"strategy": strategy | {"n": 2}, "max_tokens": 2, "temperature": 1}
        freed = until(lambda: chat(server, path="/llm", **small).status_code == 200, 30)
        after = time.monotonic() - idle
    return f"places given back {after:.1f} s after the branches" if freed else f"still 429 after {after:.0f} s"


@contextlib.contextmanager
def unread(server: Server, body: dict[str, Any], path: str = "") -> Iterator[socket.socket]:
    """Send a chat request whose response is not read until the block ends."""
    url = urlsplit(server.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((url.hostname, url.port))
        data = json.dumps(body).encode()
        head = f"POST {path}/v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        yield connection


def terminated_with_open_streams(server: Server) -> str:
    """Send SIGTERM while streams run, on a server that cuts them off at once; the last reproducer of its server."""
    fields: dict[str, Any] = {"stream": True, "max_tokens": 990, "ignore_eos": True, "n": 16, "temperature": 1}
    body = {"model": "demo", "messages": CHAT} | fields
    process = psutil.Process(server.pid)
    limit_s = 60
    ends: list[str] = []

    def read() -> str:
        last = ""
        try:
            with httpx.stream(
                "POST", f"{server.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=limit_s
            ) as stream:
                for line in stream.iter_lines():
                    last = line or last
        except httpx.ReadTimeout:
            return "silent"
        except httpx.TransportError:
            return "broken off"
        return "[DONE]" if last == "data: [DONE]" else "without [DONE]"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        streams = [pool.submit(read) for _ in range(4)]
        until(lambda: metric(server, "vllm:num_requests_running") > 0, 60)
        begun = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(limit_s + 30)
        took, gone = time.monotonic() - begun, not process.is_running()
        ends = sorted(stream.result() for stream in streams)
    return f"process {'gone' if gone else 'still there'} after {took:.1f} s; streams: {', '.join(ends)}"


def reasoning_tokens(server: Server) -> str:
    """Count the reasoning tokens of a vote as a request with `n` counts them."""
    fields: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "temperature": 2, "seed": 0}
    votes = chat(server, strategy={"type": "self_consistency", "n": 4}, **fields).json()["usage"]
    alone = [chat(server, **fields | {"seed": seed}).json()["usage"] for seed in range(4)]
    counts = [usage.get("completion_tokens_details", {}).get("reasoning_tokens") for usage in (votes, *alone)]
    return f"vote of 4: {counts[0]}, the same four alone: {counts[1:]}"


def strict_template(server: Server) -> str:
    """Refine under a chat template that refuses two turns of one role in a row."""
    messages = [{"role": "user", "content": "7*3"}, {"role": "assistant", "content": "7*3="}]
    flags: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False, "max_tokens": 40}
    strategy = {"type": "refinement", "rounds": 2, "answer": {"type": "text"}}
    response = chat(server, messages=messages, strategy=strategy, temperature=0, **flags).json()
    return json.dumps(response.get("strategy", response.get("error")))


def root_path_that_is_a_slash(server: Server) -> str:
    """Ask without a key on a server with `--root-path /`."""
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": CHAT}, timeout=LIMIT_S)
    return f"/v1/chat/completions without a key: {response.status_code}"


def reasoning_model() -> Path:
    """Make a copy of the demo model whose tokenizer knows <think> and </think>, with a strict chat template."""
    folder = FOLDER / "reasoning-model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(demo.MODEL_PATH, folder)
    tokenizer = folder / "tokenizer.json"
    parsed = json.loads(tokenizer.read_text())
    vocabulary = parsed["model"]["vocab"]
    for digit, name in {"8": "<think>", "9": "</think>"}.items():
        vocabulary[name] = vocabulary.pop(digit)
    tokenizer.write_text(json.dumps(parsed))
    (folder / "chat_template.jinja").write_text(ALTERNATING)
    return folder


COMMON = ("--api-key", KEY, "--max-logprobs", "100")
LIMITED = ("--root-path", "/llm", "--strategy-max-in-flight", "4", "--strategy-max-branches", "4")
PROCESSED = ("--logprobs-mode", "processed_logprobs")
DEMO = ("--served-model-name", "demo", "--enforce-eager", "--no-enable-chunked-prefill")
GROUPS = (
    Group(
        lambda: COMMON,
        (
            open_routes,
            masked_confidence,
            mistake_in_stream,
            equal_request_ids,
            usage_of_stream_helper,
            refinement_after_prefill,
            huge_objects,
            worst_validations,
            slow_pattern,
            many_log_probabilities,
            terminated_with_open_streams,
        ),
    ),
    Group(
        lambda: (*COMMON, *LIMITED, *PROCESSED),
        (statistics_below_a_root_path, masked_confidence_of_processed, slow_reader),
    ),
    Group(
        lambda: (str(reasoning_model()), *DEMO, *COMMON, "--reasoning-parser", "deepseek_r1"),
        (reasoning_tokens, strict_template),
    ),
    Group(lambda: (*COMMON, "--root-path", "/"), (root_path_that_is_a_slash,)),
    Group(
        lambda: (*COMMON, "--em-inf-statistics-address", STATISTICS_ADDRESS),
        (flood_of_statistics, statistics_without_end),
        env=(("EM_INF_STATISTICS_KEY", "0" * 32),),
    ),
)


def run(group: Group, chosen: list[str], executor: str) -> None:
    """Start a group's server, and run those of its reproducers that are chosen."""
    reproducers = [each for each in group.reproducers if each.__name__ in chosen]
    if not reproducers:
        return
    log = FOLDER / f"{reproducers[0].__name__}.log"
    try:
        with launch.serve(*EM_SERVE, *group.flags(), log=log, executor=executor, env=dict(group.env)) as server:
            for reproduce in reproducers:
                try:
                    said = reproduce(server)
                except (httpx.HTTPError, openai.OpenAIError, LookupError, ValueError, TypeError) as error:
                    said = f"could not be told: {error!r}"
                print(f"{reproduce.__name__}: {said}", flush=True)
    except RuntimeError as error:
        last = [line for line in str(error).splitlines() if line.strip()][-1]
        print(f"{', '.join(each.__name__ for each in reproducers)}: no start: {last}", flush=True)


def main() -> None:
    """Run the reproducers named, or all."""
    names = [reproduce.__name__ for group in GROUPS for reproduce in group.reproducers]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(names)}; default: all")
    parser.add_argument("--executor", choices=("uni", "mp"), default="uni", help="see harness/launch.py")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # by an exception: the server is stopped too
    if unknown := set(arguments.names) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for group in GROUPS:
        run(group, arguments.names or names, arguments.executor)


if __name__ == "__main__":
    main()
