"""Stats in responses, checked against the reference on the engine's full log-probabilities of the same request."""

import asyncio
import json
import math
from typing import Any

import openai
import pytest

from tests.engine.launch import Server
from tests.engine.support import ADAPTIVE, ALL_LOGPROBS, CHAT, EM, UNSURE, check_stats, complete, post, tokens

pytestmark = pytest.mark.engine

NONE = {"method": "none"}
TOP_H, P_LESS = {"method": "top_h"}, {"method": "p_less"}
TOPS = [0, 20, 5, 0]
METHOD_SETTINGS: list[Any] = [EM, NONE, ADAPTIVE, EM | {"optimizer": "sgd", "learning_rate": 2.0}, TOP_H, P_LESS]


@pytest.mark.essential
def test_every_tokens_stats_match_the_reference(engine: Server) -> None:
    """In a mixed batch with greedy and plain requests, prompts in chunks, n = 3, and a cache too small for all."""
    bodies = [
        {
            "prompt": "Q" * (60 * (i % 4)) + UNSURE,
            "max_tokens": 20 + 9 * (i % 5),
            "ignore_eos": True,
            "temperature": 1.5,
        }
        | ALL_LOGPROBS
        | {"em_inf": METHOD_SETTINGS[i % 6] | {"stats": "tokens", "top": TOPS[i % 4]}, "n": 3 if i % 7 == 3 else 1}
        | ({"temperature": 0, "n": 1} if i % 9 == 5 else {})
        for i in range(40 if engine.runner == "v1" else 10)
    ]
    plain = [{"prompt": UNSURE, "max_tokens": 30, "em_inf": em} for em in (False, True, EM)]
    preempted = engine.metric("vllm:num_preemptions_total")
    responses = complete(engine, *bodies, *plain)
    assert engine.metric("vllm:num_preemptions_total") > preempted, "no request was preempted"
    checked = sum(
        check_stats(response, body["em_inf"], body["temperature"])
        for response, body in zip(responses, bodies, strict=False)
    )
    assert checked >= (1500 if engine.runner == "v1" else 400)
    assert not any("em_inf" in response for response in responses[len(bodies) :])


def summaries(client: openai.OpenAI, stats: str, stream: bool, **options: Any) -> dict[str, Any]:
    """Return the summaries of a chat response, by the choice's index."""
    settings: dict[str, Any] = {"max_tokens": 12, "seed": 3, "n": 2, "temperature": 1.5} | options
    extra_body = {"em_inf": EM | {"stats": stats}}
    response: Any = client.chat.completions.create(
        model="demo", messages=CHAT, stream=stream, extra_body=extra_body, **settings
    )
    if not stream:
        return {summary["index"]: summary for summary in response.em_inf}
    chunks = list(response)
    assert chunks[-1].choices == []
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert not any("em_inf" in (chunk.model_extra or {}) for chunk in chunks[:-1])
    return {summary["index"]: summary for summary in chunks[-1].em_inf}


@pytest.mark.essential
def test_chat(v1: Server) -> None:
    full = summaries(v1.client, "tokens", stream=False)
    assert sorted(full) == [0, 1]
    assert full == summaries(v1.client, "tokens", stream=True)
    assert any(summary["optimized_tokens"] for summary in full.values())
    short = {index: {k: v for k, v in summary.items() if k != "per_token"} for index, summary in full.items()}
    assert summaries(v1.client, "summary", stream=False) == summaries(v1.client, "summary", stream=True) == short


def test_candidates_have_the_texts_that_logprobs_have(v1: Server) -> None:
    """Streamed and not; with every route's own way to ask for log-probabilities."""
    em_inf = NONE | {"stats": "tokens", "top": 5}
    chat = {"logprobs": True, "top_logprobs": 5, "max_tokens": 12, "seed": 3, "temperature": 1.5, "messages": CHAT}
    response = v1.http.post("/v1/chat/completions", json=chat | {"model": "demo", "em_inf": em_inf}).json()
    tokens_of_choice = response["choices"][0]["logprobs"]["content"]
    per_token = response["em_inf"][0]["per_token"]
    for candidates, token in zip([token["top"] for token in per_token], tokens_of_choice, strict=True):
        listed = {(each["token"], round(math.exp(each["logprob"]), 4)) for each in token["top_logprobs"]}
        assert {(each["token"], round(each["before"], 4)) for each in candidates} == listed
        assert all(each["after"] == each["before"] for each in candidates)
    body = {name: value for name, value in chat.items() if "logprobs" not in name} | {"model": "demo", "em_inf": em_inf}
    lines = v1.http.post("/v1/chat/completions", json=body | {"stream": True}).text.strip().split("\n\n")
    assert json.loads(lines[-2].removeprefix("data: "))["em_inf"][0]["per_token"] == per_token


def test_candidates_of_a_method_that_removes_tokens_end_with_those(engine: Server) -> None:
    em_inf = {"method": "greedy_below", "p_max": 1.0, "stats": "tokens", "top": 4}
    [response] = complete(engine, {"prompt": UNSURE, "max_tokens": 10, "ignore_eos": True, "em_inf": em_inf})
    for token in response["em_inf"][0]["per_token"]:
        assert [candidate["after"] for candidate in token["top"]] == [1, 0, 0, 0]
        before = [candidate["before"] for candidate in token["top"]]
        assert before == sorted(before, reverse=True) and 0 < sum(before) <= 1.0001
    ids = [token["top"][0]["id"] for token in response["em_inf"][0]["per_token"]]
    assert ids == response["choices"][0]["token_ids"]


@pytest.mark.essential
def test_a_stream_with_usage_has_both(v1: Server) -> None:
    body = {"messages": CHAT, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5}
    body |= {"model": "demo", "em_inf": NONE | {"stats": "summary"}}
    lines = v1.http.post("/v1/chat/completions", json=body).text.strip().split("\n\n")
    *content, last = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert lines[-1] == "data: [DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == last["em_inf"][0]["tokens"]
    assert not any("em_inf" in chunk for chunk in content)


@pytest.mark.essential
@pytest.mark.parametrize("strategy", [None, {"type": "self_consistency", "n": 3}])
def test_the_clients_stream_helper_keeps_the_usage(v1: Server, strategy: Any) -> None:
    """It keeps the usage of the last chunk; our fields are in the last event."""
    body = {"em_inf": EM | {"stats": "summary"}} | ({"strategy": strategy} if strategy else {})
    # Greedy, so that the reply ends: the helper raises an error if it is cut off.
    options: Any = {"model": "demo", "messages": CHAT, "max_tokens": 150, "seed": 3, "extra_body": body}
    options["temperature"] = 1 if strategy else 0
    with v1.client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        *_, last = [event.chunk for event in stream if event.type == "chunk"]
        usage = stream.get_final_completion().usage
    response: Any = v1.client.chat.completions.create(**options)
    assert usage == last.usage == response.usage
    assert (last.model_extra or {})["em_inf"] == response.em_inf


def test_every_chunk_has_a_usage_that_never_falls(v1: Server) -> None:
    stream: Any = v1.client.chat.completions.create(
        model="demo",
        messages=CHAT,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        extra_body={"em_inf": EM | {"stats": "summary"}, "strategy": {"type": "self_consistency", "n": 3}},
    )
    chunks = list(stream)
    totals = [chunk.usage.total_tokens for chunk in chunks]
    assert chunks[0].strategy["running"] > 0
    assert totals == sorted(totals)
    assert chunks[-1].usage.completion_tokens == sum(chunks[-1].strategy["completion_tokens"])


def test_a_clients_mistake_in_a_stream_is_a_rejected_request(v1: Server) -> None:
    def count(outcome: str) -> float:
        return v1.metric("em_inf_requests_total", outcome=outcome)

    before = count("rejected"), count("failed")
    body = {"model": "demo", "messages": CHAT, "stream": True, "stop_token_ids": [10**9], "em_inf": True}
    assert '"code": 400' in v1.http.post("/v1/chat/completions", json=body).text
    assert (count("rejected"), count("failed")) == (before[0] + 1, before[1])


def test_prompts_of_one_request_keep_their_order(v1: Server) -> None:
    prompts = [UNSURE, "12+7*3-4=", "zq"]
    body = {"prompt": prompts, "n": 2, "seed": 5, "max_tokens": 6, "ignore_eos": True}
    body |= ALL_LOGPROBS | {"em_inf": EM | {"stats": "tokens"}}
    [response] = complete(v1, body)
    assert [summary["index"] for summary in response["em_inf"]] == list(range(6))
    assert check_stats(response, EM) == 36
    options: Any = {"stream": True, "extra_body": body | {"logprobs": None}}
    streamed = v1.client.completions.create(model="demo", prompt=prompts, **options)
    assert list(streamed)[-1].em_inf == response["em_inf"]


@pytest.mark.essential
@pytest.mark.parametrize("stream", [False, True])
def test_responses(v1: Server, stream: bool) -> None:
    extra_body = {"em_inf": EM | {"stats": "tokens"}, "seed": 3}
    shared: Any = {"model": "demo", "input": "58+17*3-29", "max_output_tokens": 16, "temperature": 1.5}
    response: Any = v1.client.responses.create(stream=stream, extra_body=extra_body, **shared)
    if stream:
        events = list(response)
        assert events[-1].type in ("response.completed", "response.incomplete")
        response = events[-1].response
    [summary] = response.em_inf
    assert summary["tokens"] == len(summary["per_token"]) == response.usage.output_tokens
    assert summary["missing"] == 0


@pytest.mark.essential
def test_greedy_requests_are_measured_too(engine: Server) -> None:
    shared = {"prompt": UNSURE, "max_tokens": 8, "temperature": 0, "ignore_eos": True} | ALL_LOGPROBS
    measured, minimised = complete(
        engine,
        shared | {"em_inf": NONE | {"stats": "tokens"}},
        shared | {"em_inf": EM | {"stats": "tokens"}},
    )
    assert tokens(measured) == tokens(minimised)
    assert check_stats(measured, NONE) == check_stats(minimised, EM) == 8
    assert minimised["em_inf"][0]["optimized_tokens"] > 0


def test_measuring_changes_nothing(engine: Server) -> None:
    shared = {"prompt": UNSURE, "max_tokens": 12, "seed": 4, "temperature": 1.5, "ignore_eos": True}
    plain, measured = complete(engine, shared, shared | {"em_inf": NONE | {"stats": "summary"}}, one_by_one=True)
    assert tokens(plain) == tokens(measured)


def test_tokens_after_a_stop_string_have_no_stats(v1: Server) -> None:
    """The API server finds the stop string; until the engine hears of it, it samples a few more tokens."""
    for em_inf in (EM, NONE):
        body = {"prompt": UNSURE, "max_tokens": 60, "seed": 8, "temperature": 1.5, "em_inf": em_inf} | ALL_LOGPROBS
        [full] = complete(v1, body)
        stop = full["choices"][0]["text"][10:12]
        [stopped] = complete(v1, body | {"stop": stop, "em_inf": em_inf | {"stats": "tokens"}})
        assert stopped["choices"][0]["finish_reason"] == "stop"
        assert 0 < check_stats(stopped, em_inf) < 60


@pytest.mark.essential
@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/v1/completions", {"em_inf": {"stats": "all"}}, "body.em_inf.stats", "one of none, summary, tokens"),
        ("/v1/completions", {"em_inf": {"method": "none", "steps": 3}}, "body.em_inf.steps", "unknown field"),
        (
            "/v1/messages",
            {"vllm_xargs": {"em_inf_stats": "tokens"}},
            None,
            "em-serve's completions, chat and responses",
        ),
        ("/v1/chat/completions", {"em_inf": {"stats": "summary", "top": 3}}, "body.em_inf.top", "got 3; must be 0"),
        ("/v1/completions", {"vllm_xargs": {"em_inf_top": 3}}, "body.vllm_xargs.em_inf_top", "got 3; must be 0"),
        ("/v1/completions", {"em_inf": {"stats": "tokens", "top": 21}}, "body.em_inf.top", "from 0 up to 20"),
        (
            "/v1/responses",
            {"em_inf": {"stats": "tokens"}, "background": True},
            "body.em_inf.stats",
            "a background response has none",
        ),
    ],
)
def test_stats_that_cannot_be_returned_are_refused(
    v1: Server, path: str, body: dict[str, Any], param: str | None, message: str
) -> None:
    needed = {"model": "demo", "prompt": "1", "input": "1", "messages": [{"role": "user", "content": "1"}]}
    unknown = {"/v1/completions": ("input", "messages"), "/v1/messages": ("prompt", "input")}.get(path, ("prompt",))
    needed = {name: value for name, value in needed.items() if name not in unknown} | {"max_tokens": 4}
    response = v1.http.post(path, json=needed | body)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]
    assert param is None or response.json()["error"]["param"] == param


@pytest.mark.essential
def test_a_client_cannot_choose_where_stats_go(v1: Server) -> None:
    """Only the server sets the return address in extra_args; what a client puts there is overwritten or ignored."""
    forged = {"vllm_xargs": {"em_return_address": ["f" * 32, 1, 0, 1]}}
    body = {"prompt": UNSURE, "max_tokens": 4, "ignore_eos": True} | forged
    responses = complete(v1, body, body | {"em_inf": EM | {"stats": "tokens"}}, body | {"em_inf": EM})
    assert [len(tokens(response)) for response in responses] == [4, 4, 4]
    assert responses[1]["em_inf"][0]["missing"] == 0


def test_clients_that_disconnect_leave_nothing_behind(engine: Server) -> None:
    """They leave in the middle of a reply or before its first token, streamed or not."""
    # Too long for any machine to finish before its client leaves.
    long = {"model": "demo", "prompt": [UNSURE] * 50, "max_tokens": 250, "ignore_eos": True}

    async def connect_and_leave() -> None:
        async with engine.async_http() as client:
            for stats in ("tokens", "none"):
                body = long | {"em_inf": EM | {"stats": stats}}
                tasks = [asyncio.create_task(post(client, body)) for _ in range(4)]
                await asyncio.to_thread(engine.until, lambda: engine.metric("em_inf_tracked_requests") >= 200)
                for task in tasks:
                    task.cancel()
                async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                    await anext(stream.aiter_lines())

    before = engine.metric("em_inf_requests_total", outcome="aborted")
    asyncio.run(connect_and_leave())
    engine.until(lambda: engine.metric("em_inf_requests_total", outcome="aborted") > before)
    engine.until(lambda: engine.metric("em_inf_tracked_requests") == 0)
    assert complete(engine, {"prompt": UNSURE, "max_tokens": 2, "em_inf": EM | {"stats": "summary"}})[0]["em_inf"]


def test_ten_thousand_requests_leave_nothing_behind(v1: Server) -> None:
    """Memory does not grow, apart from vLLM's engine process, which grows by 10 MB in as many requests without us."""
    methods: list[Any] = [EM | {"stats": "tokens"}, EM | {"stats": "summary"}, EM, NONE | {"stats": "none"}]
    shared = {"prompt": [UNSURE] * 50, "max_tokens": 2, "ignore_eos": True}

    def send_thousands(number: int) -> dict[str, int]:
        for _ in range(number):
            responses = complete(v1, *[shared | {"em_inf": methods[i % 4]} for i in range(20)])
            assert sum(response["usage"]["completion_tokens"] for response in responses) == 2000
        v1.until(lambda: v1.metric("em_inf_tracked_requests") == 0)
        return v1.memory()

    send_thousands(10)  # to warm up
    for _ in range(4):  # a leak grows every time; buffers grow by up to 6 MiB, but not in all of 10,000 requests
        tokens_before, before = v1.metric("em_inf_tokens_total"), v1.memory()
        growth = {process: (size - before[process]) / 2**20 for process, size in send_thousands(10).items()}  # MiB
        assert v1.metric("em_inf_tokens_total") == tokens_before + 20_000
        server = growth.pop("server")
        if server < 4 and max(growth.values()) < 25:
            break
    else:
        pytest.fail(f"memory grows: the server by {server} MiB, more than 400 bytes a request, or others: {growth}")
