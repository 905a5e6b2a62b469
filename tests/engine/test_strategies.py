"""Strategies on a real engine through the official client: votes, usage, streams, clients that disconnect, limits."""

import ast
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from scipy.stats import binomtest

from answers.extract import Answer
from demo.problems import problems
from tests.engine.launch import API_KEY, HANG_LIMIT_S, Server, serve
from tests.engine.support import CHAT, EM, check_deepconf, run_client_example

pytestmark = pytest.mark.engine

IN_FLIGHT = 400
PROBLEMS = int(os.environ.get("EM_TEST_PROBLEMS", "120"))  # docs/guide.md has the figures for 300
LONG = {"max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Run a server without chunked prefill: many seeded prompts may enter at once (docs/findings/upstream.md)."""
    flags = ("--no-enable-chunked-prefill", "--max-num-seqs", "128", "--strategy-max-in-flight", str(IN_FLIGHT))
    aborts = ("--enable-scale-out", "--enable-log-requests")  # a route that aborts engine requests; ids in the log
    plugin = str(Path(__file__).with_name("counting_parser.py"))
    parser = ("--reasoning-parser-plugin", plugin, "--reasoning-parser", "every_other")
    with serve(*flags, *aborts, *parser) as started:
        yield started


def chat(server: Server, strategy: Any, content: str | None = None, **options: Any) -> Any:
    settings: dict[str, Any] = {"temperature": 1, "seed": 11, "max_tokens": 100} | options
    body = {"strategy": strategy} | settings.pop("extra_body", {})
    messages = CHAT if content is None else [{"role": "user", "content": content}]
    return server.client.chat.completions.create(model="demo", messages=messages, extra_body=body, **settings)


def samples(server: Server, n: int, seed: int = 11, **options: Any) -> list[Any]:
    """Send the requests that the branches of a strategy must be equal to, one by one."""
    return [chat(server, None, seed=seed + i, **options) for i in range(n)]


def majority(n: int = 4, **settings: Any) -> dict[str, Any]:
    return {"type": "self_consistency", "n": n} | settings


# ---- Self-consistency


@pytest.mark.parametrize(("engine", "em_inf"), [("v1", None), ("v1", EM), ("v2", EM)], indirect=["engine"])
def test_branches_are_reproducible_samples_and_the_winner_is_the_first_with_the_answer(
    engine: Server, em_inf: Any
) -> None:
    extra_body = {"em_inf": em_inf} if em_inf else {}
    singles = samples(engine, 4, extra_body=extra_body)
    response: Any = chat(engine, majority(), extra_body=extra_body)
    outcome = response.strategy
    texts = [single.choices[0].message.content for single in singles]
    answers = [Answer().extract(text) for text in texts]
    assert outcome["votes"] == Counter(filter(None, answers))
    assert outcome["no_answer"] == answers.count(None)
    assert outcome["completion_tokens"] == [single.usage.completion_tokens for single in singles]
    assert response.choices[0].message.content == texts[answers.index(outcome["answer"])]
    assert response.usage.completion_tokens == sum(outcome["completion_tokens"])
    assert response.usage.prompt_tokens == 4 * singles[0].usage.prompt_tokens
    assert response.usage.total_tokens == response.usage.prompt_tokens + response.usage.completion_tokens
    assert (outcome["n"], outcome["completed"], outcome["cancelled"], outcome["failed"]) == (4, 4, 0, 0)


@pytest.mark.essential
def test_the_rest_of_the_response_is_an_ordinary_completion(v1: Server) -> None:
    plain = chat(v1, None, logprobs=True, top_logprobs=2).model_dump()
    voted = chat(v1, majority(2), logprobs=True, top_logprobs=2).model_dump()
    assert voted.pop("strategy")
    for completion in (plain, voted):
        for name in ("id", "created", "usage"):
            completion.pop(name)
    second = chat(v1, None, logprobs=True, top_logprobs=2, seed=12).model_dump()["choices"]
    assert voted["choices"] in (plain["choices"], second)
    assert voted | {"choices": 0} == plain | {"choices": 0}
    assert chat(v1, majority(2)).choices[0].logprobs is None


@pytest.mark.essential
@pytest.mark.parametrize(
    "strategy",
    [
        majority(),
        majority(weights="entropy"),
        {"type": "refinement", "answer": {"type": "text"}, "rounds": 2},
        {"type": "deepconf", "n": 4, "warmup": 2, "window": 8, "consensus": 1.0},
    ],
    ids=lambda strategy: strategy["type"] + strategy.get("weights", ""),
)
def test_a_stream_reports_progress_and_ends_like_the_response_without_streaming(v1: Server, strategy: Any) -> None:
    options: dict[str, Any] = {"extra_body": {"em_inf": EM | {"stats": "summary"}}, "max_tokens": 100}
    response = chat(v1, strategy, **options)
    chunks = list(chat(v1, strategy, stream=True, stream_options={"include_usage": True}, **options))
    progress = [chunk.strategy for chunk in chunks if "strategy" in (chunk.model_extra or {})]
    content = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(filter(None, content)) == response.choices[0].message.content
    assert len(content) > 1  # like an ordinary stream; how many depends on the machine's speed
    assert progress[0]["completed"] == 0
    assert chunks[0].choices == chunks[-1].choices == []
    assert progress[0]["running"] > 0
    assert progress[-1] == chunks[-1].strategy == response.strategy
    assert chunks[-1].em_inf == response.em_inf
    assert response.em_inf[0]["tokens"] in response.strategy["completion_tokens"]
    assert [chunk.usage for chunk in chunks if chunk.usage] == [response.usage]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk.model for chunk in chunks} == {"demo"}


def test_usage_is_what_the_engine_counted(server: Server) -> None:
    """For every strategy, streaming or not, with cancelled branches."""
    early_stop = {"early_stop": True, "parallel": 5}
    strategies: list[Any] = [majority(9, **early_stop, confidence=0.7), majority(9, **early_stop), majority(3)]
    strategies += [{"type": "refinement"}, {"type": "deepconf", "n": 10, "warmup": 3, "window": 16, "keep": 0.3}]
    questions = problems("held_out", 40, seed=3)

    async def send_all() -> list[Any]:
        async with server.async_client as client:

            async def send(i: int) -> Any:
                stream: Any = {"stream": True, "stream_options": {"include_usage": True}} if i % 2 else {}
                response: Any = await client.chat.completions.create(
                    model="demo",
                    messages=[{"role": "user", "content": questions[i].question}],
                    extra_body={"strategy": strategies[i % len(strategies)]},
                    **stream,
                )
                if not stream:
                    return response.usage, response.strategy
                chunks = [chunk async for chunk in response]
                return next(chunk.usage for chunk in chunks if chunk.usage), chunks[-1].strategy

            return await asyncio.gather(*(send(i) for i in range(len(questions))))

    names = {"completion_tokens": "vllm:generation_tokens_total", "prompt_tokens": "vllm:prompt_tokens_total"}
    before = {name: server.metric(metric) for name, metric in names.items()}
    states = ("started", "completed", "cancelled", "failed")
    branches = {state: server.metric(f"em_inf_strategy_branches_{state}_total") for state in states}
    results = asyncio.run(send_all())
    for name, metric in names.items():
        counted = server.metric(metric) - before[name]
        assert sum(getattr(usage, name) for usage, _ in results) == counted, name
    for state in states[1:]:
        counted = server.metric(f"em_inf_strategy_branches_{state}_total") - branches[state]
        assert counted == sum(outcome[state] for _, outcome in results), state
    assert sum(outcome["cancelled"] for _, outcome in results) > 0  # how many depends on the machine's speed
    assert server.metric("em_inf_strategy_branches_running") == 0
    assert server.metric("em_inf_strategy_agreement_count") >= 32
    assert server.metric("em_inf_strategy_tokens_saved_total") > 0


@pytest.mark.parametrize("stream", [False, True])
def test_usage_has_the_reasoning_of_all_branches(server: Server, stream: bool) -> None:
    """The server's parser counts half of a reply's tokens, rounded up."""
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response: Any = chat(server, majority(4), **options)
    usage = next(chunk.usage for chunk in response if chunk.usage) if stream else response.usage
    singles = samples(server, 4)
    counted = [single.usage.completion_tokens_details.reasoning_tokens for single in singles]
    assert counted == [(single.usage.completion_tokens + 1) // 2 for single in singles]
    assert usage.completion_tokens_details.reasoning_tokens == sum(counted)


def test_requests_with_equal_ids_do_not_touch_each_other(server: Server) -> None:
    """Early stops abort branches, and a plain request has the id that a branch would have by counting.

    The first reply decides a vote. Branches of nearly random tokens end at different steps, so that others run then.
    """
    vote = majority(8, early_stop=True, confidence=0.7, answer={"type": "text"})
    random_length = {"allowed_token_ids": list(range(5, 25)), "stop": ["0"], "temperature": 2}
    early_stop = {"strategy": vote} | random_length | LONG
    votes = [("dup", {"seed": 100 * i} | early_stop) for i in range(4)]
    plain = [(f"dup-{i}", {"seed": 7 + i, "temperature": 1} | LONG) for i in range(8)]

    async def ask(client: httpx.AsyncClient, identity: str, fields: dict[str, Any]) -> Any:
        body = {"model": "demo", "messages": CHAT} | fields
        response = await client.post("/v1/chat/completions", json=body, headers={"X-Request-Id": identity})
        assert response.status_code == 200, response.text
        return response.json()

    async def ask_all() -> list[Any]:
        async with server.async_http() as client:
            return await asyncio.gather(*(ask(client, *request) for request in votes + plain))

    async def ask_alone() -> list[Any]:
        async with server.async_http() as client:
            return [await ask(client, f"alone-{i}", fields) for i, (_, fields) in enumerate(plain)]

    together, alone = asyncio.run(ask_all()), asyncio.run(ask_alone())
    for outcome in (response["strategy"] for response in together[:4]):
        assert outcome["failed"] == 0
        assert outcome["completed"] + outcome["cancelled"] == 8
        assert outcome["cancelled"] > 0
    for one, other in zip(together[4:], alone, strict=True):
        assert one["choices"][0] == other["choices"][0]
        assert one["choices"][0]["finish_reason"] == "length"


MASKS: dict[str, dict[str, Any]] = {
    "a grammar with a choice": {"structured_outputs": {"regex": "[1-9][0-9]{3}"}},
    "a grammar without": {"structured_outputs": {"choice": ["12"]}},
    "allowed tokens": {"allowed_token_ids": [5, 6, 7]},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("stream", [False, True])
def test_deepconf_goes_with_masks(engine: Server, mask: dict[str, Any], stream: bool) -> None:
    strategy = {"type": "deepconf", "n": 4, "warmup": 2, "window": 2, "consensus": 1.0, "answer": {"type": "text"}}
    body = {"model": "demo", "messages": CHAT, "temperature": 2, "seed": 3, "max_tokens": 4, "stream": stream}
    response = engine.http.post("/v1/chat/completions", json=body | {"strategy": strategy} | mask)
    assert response.status_code == 200, response.text
    outcome = check_deepconf(response.text, stream)
    assert (outcome["threshold"] is None) == ("choice" in mask.get("structured_outputs", ()))


def solve_problems(server: Server, strategy: Any) -> list[Any]:
    """Ask held-out problems with `strategy` at temperature 1, sixteen at a time; return the responses."""
    held_out = problems("held_out", PROBLEMS, seed=17)

    async def send_all() -> list[Any]:
        limit = asyncio.Semaphore(16)
        async with server.async_client as client:

            async def send(i: int) -> Any:
                async with limit:
                    return await client.chat.completions.create(
                        model="demo",
                        messages=[{"role": "user", "content": held_out[i].question}],
                        temperature=1,
                        seed=1000 * i,
                        extra_body={"strategy": strategy} if strategy else {},
                    )

            return await asyncio.gather(*(send(i) for i in range(PROBLEMS)))

    return asyncio.run(send_all())


def test_a_vote_of_16_is_right_more_often_than_its_first_sample_and_early_stop_changes_no_decided_vote(
    server: Server,
) -> None:
    held_out = problems("held_out", PROBLEMS, seed=17)
    early_stop = majority(16, early_stop=True, parallel=4)
    single, full, stopped = (solve_problems(server, strategy) for strategy in (None, majority(16), early_stop))
    first_right = [
        Answer().extract(response.choices[0].message.content) == str(p.answer)
        for response, p in zip(single, held_out, strict=True)
    ]
    vote_right = [response.strategy["answer"] == str(p.answer) for response, p in zip(full, held_out, strict=True)]
    better = sum(vote and not first for vote, first in zip(vote_right, first_right, strict=True))
    worse = sum(first and not vote for vote, first in zip(vote_right, first_right, strict=True))
    print(f"right: one sample {sum(first_right)}, vote {sum(vote_right)} of {PROBLEMS}; better {better}, worse {worse}")
    assert binomtest(better, better + worse, alternative="greater").pvalue < 0.01
    decided = 0
    for complete, early in zip(full, stopped, strict=True):
        top, second, *_ = [*sorted(complete.strategy["votes"].values(), reverse=True), 0, 0]
        if top > second:
            decided += 1
            assert early.strategy["answer"] == complete.strategy["answer"]
    tokens = [sum(response.usage.completion_tokens for response in responses) for responses in (full, stopped)]
    print(f"decided {decided}; tokens {tokens[0]}, with early stop {tokens[1]}")
    assert decided > PROBLEMS / 2
    assert tokens[1] < 0.9 * tokens[0]


def test_the_example_prints_the_outcome_of_its_vote(server: Server) -> None:
    """The numbers agree with each other and with what the engine counted; how many samples end early may vary."""
    server.until(lambda: not in_engine(server))
    generated = server.metric("vllm:generation_tokens_total")
    *reply, votes_line, answer_line, samples_line, usage_line = run_client_example(
        "self_consistency.py", server
    ).splitlines()
    votes_text, no_answer = votes_line.removeprefix("votes: ").split(", without an answer: ")
    votes: dict[str, int] = ast.literal_eval(votes_text)
    answer, agreement = answer_line.removeprefix("answer: ").split(", agreement: ")
    completed, cancelled = map(int, re.findall(r"(\d+) c", samples_line))
    assert f"\\boxed{{{answer}}}" in "\n".join(reply)
    assert votes[answer] == max(votes.values())
    assert agreement == f"{votes[answer] / sum(votes.values()):.0%}"
    assert sum(votes.values()) + int(no_answer) == completed
    assert completed > 1
    assert completed + cancelled <= 16
    used = int(usage_line.split(", ")[1].removesuffix(" completion tokens"))
    assert server.metric("vllm:generation_tokens_total") - generated == used


# ---- Refinement


@pytest.mark.essential
def test_each_round_sees_the_reply_before_it(v1: Server) -> None:
    response: Any = chat(v1, {"type": "refinement", "rounds": 2}, content="9+4")
    first = chat(v1, None, content="9+4")
    turns = [{"role": "assistant", "content": first.choices[0].message.content}]
    turns.append({"role": "user", "content": "Check your answer."})  # the refinement prompt of the demo model
    second: Any = v1.client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "9+4"}, *turns], temperature=1, seed=12, max_tokens=100
    )
    assert response.choices[0].message.content == second.choices[0].message.content
    assert response.usage.prompt_tokens == first.usage.prompt_tokens + second.usage.prompt_tokens
    assert response.strategy["completion_tokens"] == [reply.usage.completion_tokens for reply in (first, second)]


def test_refinement_stops_when_the_context_is_full(server: Server) -> None:
    """The first round fills the context, and the second prompt would be longer."""
    options: dict[str, Any] = {"max_tokens": 200, "extra_body": {"ignore_eos": True}}
    response: Any = chat(server, {"type": "refinement", "rounds": 3}, "7+8*2-" * 20 + "1", **options)
    assert (response.strategy["stopped_by"], response.strategy["completed"]) == ("context", 1)
    assert response.choices[0].finish_reason == "length"
    assert response.choices[0].message.content


# ---- What is refused

STRATEGY = majority()
# Fields of a request, the field that the error names, and a part of its message.
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no object": ({"strategy": "self_consistency"}, "body.strategy", "an object"),
    "no type": ({"strategy": {"n": 4}}, "body.strategy.type", "self_consistency, refinement, deepconf"),
    "n of 1": ({"strategy": majority(1)}, "body.strategy.n", "from 2 up to 64"),
    "n of 1,000": ({"strategy": majority(1000)}, "body.strategy.n", "got 1000; this server allows"),
    "n in words": ({"strategy": majority() | {"n": "4"}}, "body.strategy.n", 'got "4"'),
    "an unknown field": ({"strategy": majority(votes=3)}, "body.strategy.votes", "unknown field"),
    "an evil pattern": (
        {"strategy": majority(answer={"type": "regex", "pattern": "(?<=a)b"})},
        "body.strategy.answer",
        "RE2",
    ),
    "confidence alone": ({"strategy": majority(confidence=0.9)}, "body.strategy", "early_stop"),
    "entropy unknown": ({"strategy": majority(weights="entropy")}, "body.strategy.weights", "stats"),
    "greedy": ({"strategy": STRATEGY, "temperature": 0}, "body.temperature", "above 0"),
    "top_k of 1": ({"strategy": STRATEGY, "top_k": 1}, "body.top_k", "got 1; self_consistency needs 2 or more"),
    "top_p of nearly 0": ({"strategy": STRATEGY, "top_p": 1e-9}, "body.top_p", "a value above 1e-06"),
    "min_p of 1": ({"strategy": {"type": "deepconf"}, "min_p": 1}, "body.min_p", "a value below 1"),
    "large xargs": ({"strategy": STRATEGY, "vllm_xargs": {"a": "x" * 10**6}}, "body.vllm_xargs", "at most 65536 with"),
    "large lists": ({"strategy": STRATEGY, "stop": ["x" * 40_000] * 2}, "body.stop", "at most 65536 with a strategy"),
    "choices": ({"strategy": STRATEGY, "n": 3}, "body.n", "got 3"),
    "beams": ({"strategy": STRATEGY, "use_beam_search": True}, "body.use_beam_search", "self_consistency"),
    "tools": (
        {"strategy": STRATEGY, "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},
        "body.tools",
        "text of replies",
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "param", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_requests_that_cannot_work_are_refused_with_the_reason(
    v1: Server, body: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    request = {"model": "demo", "messages": CHAT, "temperature": 1, "max_tokens": 3, "stream": stream} | body
    response = v1.http.post("/v1/chat/completions", json=request)
    assert response.status_code == 400, response.text[:300]
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert v1.metric("em_inf_strategy_branches_running") == 0
    rest = {name: value for name, value in request.items() if name not in body}
    good = v1.http.post("/v1/chat/completions", json=rest)
    assert good.status_code == 200, good.text


@pytest.mark.essential
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/responses", "/tokenize"])
def test_other_routes_refuse_strategies(v1: Server, route: str) -> None:
    content = {"input" if route == "/v1/responses" else "prompt": "7"}
    response = v1.http.post(route, json={"model": "demo", "strategy": STRATEGY} | content)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "body.strategy"
    assert "/v1/chat/completions" in response.json()["error"]["message"]


@pytest.mark.essential
def test_clients_can_ask_which_strategies_there_are(v1: Server) -> None:
    strategies = v1.http.get("/v1/em_inf").json()["strategies"]
    assert set(strategies) == {"self_consistency", "refinement", "deepconf"}
    assert strategies["self_consistency"]["properties"]["n"]["maximum"] == 64
    model = v1.http.get("/openapi.json").json()["components"]["schemas"]["EMInfChatCompletionRequest"]
    assert {"$ref": "#/components/schemas/Refinement"} in model["properties"]["strategy"]["anyOf"]


# ---- Clients that disconnect, branches that fail, limits


STARTED, FAILED = (f"em_inf_strategy_branches_{state}_total" for state in ("started", "failed"))


def in_engine(server: Server) -> float:
    """Return the number of engine requests that run or wait."""
    return server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")


def steps_until_idle(server: Server) -> float:
    """Wait until no engine request runs or waits; return how many steps the engine has taken until then."""
    steps = "vllm:iteration_tokens_total_count"  # steps with output, for aborted requests too
    before = server.metric(steps)
    server.until(lambda: not in_engine(server))
    return server.metric(steps) - before


def test_branches_end_when_their_client_is_killed(server: Server) -> None:
    """If they ran to their end, the engine would take more than 400 steps: 5 x 64 branches, 128 at once, 200 tokens."""
    for stream in (False, True):
        body = {"model": "demo", "messages": CHAT, "strategy": majority(64), "stream": stream, "temperature": 1} | LONG
        code = f"import httpx\nhttpx.post({server.url + '/v1/chat/completions'!r}, json={body!r}, timeout=300)"
        script = code.replace("timeout", f"headers={{'Authorization': 'Bearer {API_KEY}'}}, timeout")
        started = server.metric(STARTED)
        clients = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(5)]
        server.until(lambda: server.metric(STARTED) == started + 5 * 64)  # noqa: B023  # called at once
        for client in clients:
            client.send_signal(signal.SIGKILL)
        assert steps_until_idle(server) < 100
        for client in clients:
            client.wait()
        server.until(lambda: server.metric("em_inf_strategy_branches_running") == 0)


def test_fifty_clients_at_random_leave_nothing_behind(server: Server) -> None:
    rng = random.Random(5)
    names = [f"em_inf_strategy_branches_{state}_total" for state in ("completed", "cancelled", "failed")]

    async def ask(client: httpx.AsyncClient, i: int) -> int:
        """Return 1 after a response, 0 if the client left before it."""
        body: dict[str, Any] = {"model": "demo", "messages": CHAT, "stream": i % 2 == 0, "temperature": 1.5}
        body |= {"strategy": majority(8), "em_inf": EM | {"stats": "summary"}, "max_tokens": 150}
        wait = rng.choice((None, rng.uniform(0, 3)))
        try:
            response = await asyncio.wait_for(client.post("/v1/chat/completions", json=body), wait)
        except TimeoutError:
            return 0
        assert response.status_code == 200
        return 1

    async def ask_all() -> list[int]:
        async with server.async_http() as client:
            return await asyncio.gather(*(ask(client, i) for i in range(50)))

    answered = asyncio.run(ask_all())
    assert 5 < sum(answered) < 50
    assert steps_until_idle(server) < 50
    server.until(lambda: server.metric("em_inf_strategy_branches_running") == 0)
    server.until(lambda: server.metric("em_inf_tracked_requests") == 0)
    assert server.metric("em_inf_strategy_branches_started_total") == sum(map(server.metric, names))
    # All branches were released: a request with as many as allowed is accepted.
    fits = chat(server, majority(64, early_stop=True, confidence=0.6), content="9+4")
    assert fits.strategy["completed"] > 0


def test_more_branches_than_the_limit_get_429(server: Server) -> None:
    body = {"model": "demo", "messages": CHAT, "strategy": majority(64), "stream": True, "temperature": 1} | LONG
    fit = IN_FLIGHT // 64

    async def exceed_limit() -> httpx.Response:
        async with server.async_http() as client:
            streams = [client.stream("POST", "/v1/chat/completions", json=body) for _ in range(fit)]
            with halted_engine(server):  # no branch ends, so that no place becomes free
                for stream in streams:
                    assert (await stream.__aenter__()).status_code == 200
                refused = await client.post("/v1/chat/completions", json=body)
                one = body | {"strategy": None, "stream": False, "max_tokens": 1}
                plain = asyncio.create_task(client.post("/v1/chat/completions", json=one))
            for stream in streams:
                await stream.__aexit__(None, None, None)
            assert (await plain).status_code == 200
            return refused

    refused = asyncio.run(exceed_limit())
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    error = refused.json()["error"]
    assert error["message"] == f"64 places asked for, {IN_FLIGHT - fit * 64} of {IN_FLIGHT} are free"
    assert (error["type"], error["param"], error["code"]) == ("Too Many Requests", "body.strategy", 429)
    assert steps_until_idle(server) < 100
    assert chat(server, majority(2)).strategy["completed"] == 2


@contextlib.contextmanager
def halted_engine(server: Server) -> Iterator[None]:
    """Halt the engine's process; its API server goes on."""
    [engine] = [process for process in server.processes() if "EngineCore" in " ".join(process.cmdline())]
    engine.suspend()
    try:
        yield
    finally:
        engine.resume()


def branch_ids(server: Server, identity: str) -> list[str]:
    """Return the ids of the branches that vLLM knows, without the digits that vLLM adds, in order."""
    pattern = rf"Added request (chatcmpl-{identity}-(\d+)-[0-9a-f]{{32}})-[0-9a-f]{{8}}\."
    found = {int(number): name for name, number in re.findall(pattern, server.log.read_text(errors="replace"))}
    return [found[number] for number in sorted(found)]


@pytest.mark.parametrize("stream", [False, True])
def test_branches_that_the_engine_aborts_leave_the_vote_to_the_others(server: Server, stream: bool) -> None:
    """A route of vLLM aborts them here, in place of whatever else may end an engine request."""
    n = 48

    async def vote(lost: int) -> httpx.Response:
        identity = f"lost-{lost}-{stream}"
        body = {"model": "demo", "messages": CHAT, "strategy": majority(n), "stream": stream, "temperature": 1} | LONG
        failed = server.metric(FAILED)
        async with server.async_http() as client:
            request = client.post("/v1/chat/completions", json=body, headers={"X-Request-Id": identity})
            with halted_engine(server):  # no branch ends before it is aborted
                pending = asyncio.ensure_future(request)
                async with asyncio.timeout(HANG_LIMIT_S):
                    while server.metric(FAILED) < failed + lost:  # an abort has no effect before vLLM knows the branch
                        ids = branch_ids(server, identity)[:lost]
                        aborted = await client.post("/inference/v1/abort_requests", json={"request_ids": ids})
                        assert aborted.status_code == 200, aborted.text
                        await asyncio.sleep(0.05)
            return await pending

    response = asyncio.run(vote(n - 1))
    assert response.status_code == 200
    data = response.text.strip().split("\n\n")[-2].removeprefix("data: ") if stream else response.text
    outcome = json.loads(data)["strategy"]
    assert (outcome["completed"], outcome["failed"]) == (1, n - 1)
    response = asyncio.run(vote(n))
    error = json.loads(response.text.split("\n\n")[-3].removeprefix("data: ") if stream else response.text)["error"]
    assert (error["code"], error["message"]) == (500, f"all {n} branches failed")
    assert response.status_code == (200 if stream else 500)
    assert chat(server, majority(2)).strategy["completed"] == 2
