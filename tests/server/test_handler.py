"""One request through the handler, around a stand-in for vLLM's: settings, strategy, extras and the outcome."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

from server.admission import BranchLimit
from server.engine import request_stats_var, strategy_run_var
from server.handler import token_texts, with_em_inf
from server.protocol import Settings, with_our_fields
from server.stats.collector import RequestStats
from server.stats.metrics import Metrics
from server.strategies.branches import NoNextPromptError
from server.strategies.metrics import StrategyMetrics
from server.strategies.registry import STRATEGIES
from server.strategies.run import StrategyRun

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
VOTE = {"type": "self_consistency", "n": 3}


class Seen(NamedTuple):
    """What vLLM's handler finds when it is called."""

    xargs: dict[str, Any] | None
    request_stats: list[RequestStats] | None
    run: StrategyRun | None
    branches_taken: int


class ChatCompletionRequest(BaseModel, extra="allow"):
    """The fields of vLLM's request that the handler reads."""

    model: str = "m"
    messages: list[Any] = []
    n: int | None = None
    use_beam_search: bool = False
    tools: Any = None
    tool_choice: Any = None
    vllm_xargs: dict[str, Any] | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    prompt_logprobs: int | None = None
    continue_final_message: bool = False
    logprob_token_ids: list[int] | None = None


class Server:
    """The state of an app, and vLLM's handler: `answer` is called with the request that reaches it."""

    def __init__(self, answer: Callable[[Any], Any] = lambda request: JSONResponse({"id": "1"})) -> None:
        self.answer = answer
        self.reached_vllm: list[Seen] = []
        self.registry = CollectorRegistry()
        self.limit = BranchLimit(4)
        self.state = SimpleNamespace(
            em_inf=Settings(strategy_refinement_prompt="Again."),
            em_inf_metrics=Metrics("m", self.registry),
            strategy_metrics=StrategyMetrics("m", list(STRATEGIES), self.registry),
            branch_limit=self.limit,
            openai_serving_chat=SimpleNamespace(_include_reasoning_tokens_details=False),
        )

    async def vllm_handler(self, request: ChatCompletionRequest, raw_request: Request) -> Any:
        """Create a completion."""
        self.reached_vllm.append(
            Seen(request.vllm_xargs, request_stats_var.get(), strategy_run_var.get(), self.limit.taken)
        )
        return self.answer(request)

    def send(self, route: str = CHAT, **fields: Any) -> Any:
        handler = with_em_inf(self.vllm_handler, route)
        model = with_our_fields(ChatCompletionRequest, strategies=True)
        url = SimpleNamespace(path=f"/prefix{route}")  # under a root path
        raw_request: Any = SimpleNamespace(app=SimpleNamespace(state=self.state), url=url)
        response: Awaitable[Any] = handler(model(**fields), raw_request)
        return asyncio.run(response)  # type: ignore[arg-type]

    def outcomes(self) -> dict[tuple[str, str], float]:
        """Return the requests counted, by method and outcome."""
        samples = [s for m in self.registry.collect() for s in m.samples if s.name == "em_inf_requests_total"]
        return {(s.labels["method"], s.labels["outcome"]): s.value for s in samples if s.value}


def raises(error: BaseException) -> Callable[[Any], Any]:
    def answer(request: Any) -> Any:
        raise error

    return answer


def test_a_request_without_our_fields_gets_vllms_response() -> None:
    response = JSONResponse({"id": "1"})
    server = Server(lambda request: response)
    assert server.send() is response
    assert server.reached_vllm == [Seen(None, None, None, 0)]
    assert server.outcomes() == {}


def test_settings_reach_vllm_and_the_response_has_the_stats() -> None:
    server = Server()
    response = server.send(em_inf={"steps": 3, "stats": "summary"})
    (seen,) = server.reached_vllm
    assert seen.xargs
    assert seen.xargs["em_inf"]["steps"] == 3
    assert seen.request_stats == []  # engine requests will be added
    assert json.loads(response.body) == {"id": "1", "em_inf": []}
    assert server.outcomes() == {("em_inf", "completed"): 1}


def test_wrong_settings_are_rejected_and_counted_with_the_method_unknown() -> None:
    server = Server()
    with pytest.raises(VLLMValidationError, match="got 99") as caught:
        server.send(em_inf={"steps": 99})
    assert caught.value.parameter == "body.em_inf.steps"
    assert server.outcomes() == {("unknown", "rejected"): 1}


def test_a_strategy_reserves_its_branches_until_the_response() -> None:
    server = Server()
    response = server.send(strategy=VOTE)
    (seen,) = server.reached_vllm
    assert seen.run
    assert (seen.run.strategy.type, seen.branches_taken, server.limit.taken) == ("self_consistency", 3, 0)
    summary = json.loads(response.body)["strategy"]
    assert (summary["type"], summary["n"], summary["completed"]) == ("self_consistency", 3, 0)


def test_a_strategy_that_does_not_fit_is_answered_with_429() -> None:
    server = Server(raises(AssertionError("vLLM must not see it")))
    response = server.send(strategy=VOTE | {"n": 5})
    assert isinstance(response, Response)
    assert response.status_code == 429
    assert json.loads(bytes(response.body))["error"]["message"] == "5 places asked for, 4 of 4 are free"
    assert server.limit.taken == 0


def test_other_routes_reject_a_strategy() -> None:
    server = Server()
    with pytest.raises(VLLMValidationError, match="use /v1/chat/completions") as caught:
        server.send(COMPLETIONS, strategy=VOTE)
    assert caught.value.parameter == "body.strategy"
    with pytest.raises(VLLMValidationError, match="must be one of") as caught:
        server.send(CHAT, strategy={"type": "magic"})
    assert caught.value.parameter == "body.strategy.type"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (VLLMClientError("longer than the context"), "rejected"),
        (RuntimeError("the engine is dead"), "failed"),
        (asyncio.CancelledError(), "aborted"),
    ],
)
def test_an_exception_of_vllms_is_an_outcome_and_releases_the_branches(error: BaseException, outcome: str) -> None:
    server = Server(raises(error))
    with pytest.raises(type(error)):
        server.send(em_inf=True, strategy=VOTE)
    assert server.outcomes() == {("em_inf", outcome): 1}
    assert server.limit.taken == 0


def test_vllms_none_for_a_client_that_has_gone_is_an_aborted_request() -> None:
    server = Server(lambda request: None)
    assert server.send(em_inf=True, strategy=VOTE) is None
    assert server.outcomes() == {("em_inf", "aborted"): 1}
    assert server.limit.taken == 0


def test_refinements_next_prompt_is_the_conversation_with_the_reply_and_the_operators_prompt() -> None:
    rendered: list[Any] = []

    async def render_chat_request(request: Any) -> Any:
        rendered.append(request)
        if request.messages[1]["content"] == "too long":
            raise VLLMValidationError("longer than the context", parameter="input_tokens")
        if request.messages[1]["content"] == "refused":
            raise VLLMValidationError("roles must alternate")
        return request.messages, ["the prompt"]

    server = Server()
    server.state.openai_serving_chat.render_chat_request = render_chat_request
    messages = [{"role": "user", "content": "7*8"}]
    server.send(messages=messages, strategy={"type": "refinement"})
    (seen,) = server.reached_vllm
    assert seen.run
    assert asyncio.run(seen.run.branches.next_prompt("54")) == "the prompt"
    turns = [{"role": "assistant", "content": "54"}, {"role": "user", "content": "Again."}]
    assert rendered[0].messages == [*messages, *turns]
    assert (rendered[0].add_generation_prompt, rendered[0].continue_final_message) == (True, False)
    for reply, stopped_by in (("too long", "context"), ("refused", "template")):
        with pytest.raises(NoNextPromptError, match=stopped_by):
            asyncio.run(seen.run.branches.next_prompt(reply))


@pytest.mark.parametrize(
    ("prefill", "joined"),
    [
        ("7*3=", "7*3=21"),
        (None, "21"),
        ([{"type": "text", "text": "7*3="}], [{"type": "text", "text": "7*3=21"}]),
        (
            [{"type": "refusal", "refusal": "no"}],
            [{"type": "refusal", "refusal": "no"}, {"type": "text", "text": "21"}],
        ),
    ],
)
def test_a_prefill_and_its_continuation_are_one_turn_in_the_next_round(prefill: Any, joined: Any) -> None:
    rendered: list[Any] = []

    async def render_chat_request(request: Any) -> Any:
        rendered.append(request)
        return request.messages, ["the prompt"]

    server = Server()
    server.state.openai_serving_chat.render_chat_request = render_chat_request
    before = [{"role": "system", "content": "Calculate."}, {"role": "tool", "content": [{"type": "text", "text": "1"}]}]
    messages = [*before, {"role": "assistant", "content": prefill}]
    server.send(messages=messages, strategy={"type": "refinement"}, continue_final_message=True)
    (seen,) = server.reached_vllm
    assert seen.run
    assert asyncio.run(seen.run.branches.next_prompt("21")) == "the prompt"
    turns = [{"role": "assistant", "content": joined}, {"role": "user", "content": "Again."}]
    assert rendered[0].messages == [*before, *turns]
    assert (rendered[0].add_generation_prompt, rendered[0].continue_final_message) == (True, False)
    assert messages[-1]["content"] == prefill
    asyncio.run(seen.run.branches.next_prompt("7*3=21, checked"))  # a whole reply: it did not continue anything
    turns[0] = {"role": "assistant", "content": "7*3=21, checked"}
    assert rendered[1].messages == [*before, *turns]


def test_several_prompts_under_a_root_path_have_their_own_statistics() -> None:
    """The route is the handler's own, whatever path the request came by."""

    def answer(request: Any) -> JSONResponse:
        requests = request_stats_var.get()
        assert requests is not None
        for number in range(3):
            requests.append(RequestStats(number, "em_inf", 1))
            requests[-1].final.set()
        return JSONResponse({"id": "1"})

    response = Server(answer).send(COMPLETIONS, em_inf={"stats": "summary"})
    assert [choice["index"] for choice in json.loads(response.body)["em_inf"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "places"),
    [
        ({}, 2),
        ({"top_logprobs": 5}, 2),  # not without logprobs
        ({"logprobs": True}, 2),
        ({"logprobs": True, "top_logprobs": 5}, 4),
        ({"prompt_logprobs": 6}, 6),
        ({"logprobs": True, "logprob_token_ids": [5, 6, 7]}, 4),
        ({"logprobs": True, "top_logprobs": -1}, 7),
    ],
)
def test_log_probabilities_cost_places(fields: dict[str, Any], places: int) -> None:
    server = Server()
    server.limit.limit = 7
    server.send(strategy=VOTE | {"n": 2}, **fields)
    assert server.reached_vllm[0].branches_taken == places
    assert server.limit.taken == 0


def test_reasoning_tokens_are_counted_by_a_parser_for_each_branch() -> None:
    class Parser:
        prompt: list[int] | None = None

        def set_prompt_token_ids(self, prompt: list[int]) -> None:
            assert self.prompt is None
            self.prompt = prompt

        def count_reasoning_tokens(self, token_ids: list[int]) -> int:
            assert self.prompt is not None
            return token_ids.index(self.prompt[-1])

    server = Server()
    server.send(strategy=VOTE)
    serving = server.state.openai_serving_chat
    serving._include_reasoning_tokens_details = True
    serving.renderer = SimpleNamespace(tokenizer="tokenizer")
    serving._effective_chat_template_kwargs = lambda request: {"of": request.model}
    serving._make_parser = lambda request, tokenizer, template: (
        Parser() if (request.model, tokenizer, template) == ("m", "tokenizer", {"of": "m"}) else None
    )
    server.send(strategy=VOTE)
    without, with_parser = (seen.run.branches.count_reasoning for seen in server.reached_vllm if seen.run)
    assert without is None
    assert with_parser is not None
    assert [with_parser([1, end], [5, 6, 7, 8]) for end in (8, 6)] == [3, 1]


@pytest.mark.parametrize(("route", "ours"), [(CHAT, {"em_inf", "strategy"}), (COMPLETIONS, {"em_inf"})])
def test_fastapi_reads_our_fields_from_the_handlers_signature(route: str, ours: set[str]) -> None:
    app = FastAPI()
    app.post(route)(with_em_inf(Server().vllm_handler, route))
    schema = app.openapi()
    post = schema["paths"][route]["post"]
    assert post["description"] == "Create a completion."
    assert post["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/EMInfChatCompletionRequest")
    properties = schema["components"]["schemas"]["EMInfChatCompletionRequest"]["properties"]
    assert set(properties) == set(ChatCompletionRequest.model_fields) | ours


def test_ids_that_the_tokenizer_lacks_have_no_text() -> None:
    """A model may have more words than its tokenizer, and a worker's message any id: no reply may fail for it."""
    words = Tokenizer(WordLevel({"\u2581one": 0, "two": 1}, unk_token="two"))
    words.pre_tokenizer = Metaspace()  # as of Llama and Mistral: their words are looked up
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(TypeError):
        convert_ids_list_to_tokens(tokenizer, [2])
    assert token_texts(tokenizer, [2**32 - 1, 0, 2, 1]) == {0: " one", 1: "two"}
    assert token_texts(tokenizer, []) == {}
