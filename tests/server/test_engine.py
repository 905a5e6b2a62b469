"""The wrapped engine client: where stats are sent, how tokens are counted, and what a branch differs in."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm import CompletionOutput, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.parallel_sampling import ParentRequest

from em_sampler.params import RETURN_ADDRESS_KEY
from em_sampler.stats.aggregator import ReturnAddress
from em_sampler.stats.transport import SOCKET_DIR_ENV, socket_dir
from em_sampler.validation import ParamsError
from server.engine import (
    MAX_FIELD_BYTES,
    EngineBranches,
    check_field_sizes,
    give_turns,
    install_stats,
    request_stats_var,
)
from server.stats.collector import RequestStats
from server.stats.metrics import Metrics

SOCKET_NAME = "0" * 32 + ".0"
FORGED = {RETURN_ADDRESS_KEY: [SOCKET_NAME, 1, 0, True]}


class Engine:
    """An engine client that remembers its requests and yields two outputs of one token for each."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(_api_process_rank=3))
        self.model_config = SimpleNamespace(max_logprobs=20, logprobs_mode="raw_logprobs")
        self.requests: list[tuple[str, Any, SamplingParams]] = []

    async def is_tracing_enabled(self) -> bool:
        return False

    def generate(self, prompt: Any, sampling_params: SamplingParams, request_id: str) -> AsyncIterator[Any]:
        self.requests.append((request_id, prompt, sampling_params))
        return self._outputs(sampling_params)

    async def _outputs(self, sampling_params: SamplingParams) -> AsyncIterator[Any]:
        is_delta = sampling_params.output_kind == RequestOutputKind.DELTA
        for token_ids in ([7], [8] if is_delta else [7, 8]):
            completions = [SimpleNamespace(index=index, token_ids=token_ids) for index in range(sampling_params.n)]
            yield SimpleNamespace(outputs=completions, finished=token_ids[-1] == 8)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ParentRequest, "get_child_info", ParentRequest.get_child_info)  # to be restored
    with socket_dir() as folder:
        monkeypatch.setenv(SOCKET_DIR_ENV, folder)
        yield


def run(sampling_params: SamplingParams, returned: list[RequestStats] | None) -> Engine:
    """Send one request through the wrapped `generate` and consume its outputs."""
    engine: Any = Engine()

    async def main() -> None:
        await install_stats(engine, Metrics("m", CollectorRegistry()))
        request_stats_var.set(returned)
        assert [output.finished async for output in engine.generate("prompt", sampling_params, "id")] == [False, True]

    asyncio.run(main())
    return engine


@pytest.mark.parametrize(
    ("em_inf", "is_returned", "per_token"),
    [
        ({"stats": "tokens"}, True, True),
        ({"stats": "summary"}, True, True),
        ({"stats": "none"}, True, False),
        ({}, False, False),
        ({"stats": "summary"}, False, None),  # the route cannot return them: vLLM's validation rejects the request
        (None, True, None),
    ],
)
def test_a_request_has_the_return_address_of_its_api_server_alone(
    em_inf: dict[str, Any] | None, is_returned: bool, per_token: bool | None
) -> None:
    asked = SamplingParams(extra_args=FORGED | ({} if em_inf is None else {"em_inf": em_inf}))
    returned: list[RequestStats] | None = [] if is_returned else None
    ((_, _, sent),) = run(asked, returned).requests
    address = ReturnAddress.from_extra_args(sent.extra_args)
    assert asked.extra_args is not None and asked.extra_args[RETURN_ADDRESS_KEY] == FORGED[RETURN_ADDRESS_KEY]
    assert (sent.extra_args or {}).get("em_inf") == em_inf
    if per_token is None:
        assert address is None and not returned
        return
    assert address is not None and address[1:] == (0, 0, per_token)
    assert address.socket_name != SOCKET_NAME and address.socket_name.endswith(".3")
    assert [stats.number for stats in returned or ()] == ([0] if is_returned else [])


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_each_choice_s_tokens_are_counted(kind: RequestOutputKind) -> None:
    returned: list[RequestStats] = []
    run(SamplingParams(n=2, extra_args={"em_inf": {}}, output_kind=kind), returned)
    assert [choice.tokens for choice in returned[0].choices] == [2, 2]
    assert returned[0].finished


def test_each_choice_has_its_return_address() -> None:
    engine = run(SamplingParams(n=3, extra_args={"em_inf": {}}), None)
    request: Any = SimpleNamespace(request_id="id", external_req_id="id", params=engine.requests[0][2])
    children = [ParentRequest(request).get_child_info(index)[1] for index in range(3)]
    addresses = [ReturnAddress.from_extra_args(child.extra_args) for child in children]
    assert [address and address.choice for address in addresses] == [0, 1, 2]
    assert len({address and address.request_number for address in addresses}) == 1
    assert all(child.extra_args["em_inf"] == {} for child in children)


def test_a_branch_differs_in_seed_id_and_stats() -> None:
    engine = Engine()
    own = SamplingParams(seed=2**63 - 1, logprobs=None)
    request = EngineBranches(engine, engine.generate, "prompt", own, "id")
    token = request_stats_var.set(None)
    _, is_delta, _, stats = request.branch(0, None, 0, False)
    _, is_delta_too, _, other_stats = request.branch(1, "refined", 20, True)
    assert request_stats_var.get() is None
    request_stats_var.reset(token)
    assert stats is not other_stats
    assert (is_delta, is_delta_too) == (False, True)
    assert [(prompt, params.seed, params.logprobs) for _, prompt, params in engine.requests] == [
        ("prompt", 2**63 - 1, 0),
        ("refined", -(2**63), 20),
    ]
    assert own.seed == 2**63 - 1 and own.logprobs is None


def test_no_client_can_choose_or_know_a_branchs_id() -> None:
    """VLLM aborts every request that has the id of the branch to be aborted."""
    engine = Engine()
    token = request_stats_var.set(None)
    requests = [EngineBranches(engine, engine.generate, "prompt", SamplingParams(), "id") for _ in range(2)]
    ids = [request.branch(number, None, 0, False)[0] for request in requests for number in range(2)]
    request_stats_var.reset(token)
    assert ids == [request_id for request_id, *_ in engine.requests]
    assert len({*ids, "id", "id-0", "id-1"}) == 7
    assert all(re.fullmatch(r"id-[01]-[0-9a-f]{32}", request_id) for request_id in ids)


@pytest.mark.parametrize(
    ("asked", "is_flat"),
    [
        ({}, True),
        ({"logprobs": 0}, False),
        ({"logprobs": 2}, False),
        ({"prompt_logprobs": 1}, False),
        ({"logprob_token_ids": [5, 6]}, False),
    ],
)
def test_only_log_probabilities_that_the_client_asked_for_are_kept(asked: dict[str, Any], is_flat: bool) -> None:
    engine = Engine()
    request = EngineBranches(engine, engine.generate, "prompt", SamplingParams(**asked), "id")
    token = request_stats_var.set(None)
    request.branch(0, None, 5, True)
    request_stats_var.reset(token)
    sent = engine.requests[0][2]
    assert (sent.flat_logprobs, sent.num_logprobs) == (is_flat, 2 if "logprob_token_ids" in asked else 5)
    outputs: list[Any] = []
    request.collect(outputs, step("a", [{1: "logprob"}]))
    assert outputs[0].outputs[0].logprobs == (None if is_flat else [{1: "logprob"}])


def step(text: str, logprobs: Any) -> RequestOutput:
    completion = CompletionOutput(0, text, [7], cumulative_logprob=-1.0, logprobs=logprobs)
    return RequestOutput("id", "prompt", [1], None, [completion], finished=False)


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
def test_outputs_are_joined_unless_the_reply_is_a_stream(kind: RequestOutputKind) -> None:
    engine = Engine()
    request = EngineBranches(engine, engine.generate, "prompt", SamplingParams(logprobs=1, output_kind=kind), "id")
    outputs: list[Any] = []
    for text in "abc":
        request.collect(outputs, step(text, [text]))
    completions = [output.outputs[0] for output in outputs]
    seen = [(completion.text, completion.logprobs, len(completion.token_ids)) for completion in completions]
    is_stream = kind == RequestOutputKind.DELTA
    assert seen == ([(c, [c], 1) for c in "abc"] if is_stream else [("abc", ["a", "b", "c"], 3)])


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("extra_args", {"any": "x" * MAX_FIELD_BYTES}, "vllm_xargs"),
        ("extra_args", {"any": [1] * MAX_FIELD_BYTES}, "vllm_xargs"),
        ("logit_bias", dict.fromkeys(range(MAX_FIELD_BYTES // 5), 1.0), "logit_bias"),
        ("stop", ["x" * MAX_FIELD_BYTES], "stop"),
        ("allowed_token_ids", list(range(MAX_FIELD_BYTES)), "allowed_token_ids"),
        ("structured_outputs", StructuredOutputsParams(regex="x" * MAX_FIELD_BYTES), "structured_outputs"),
        ("structured_outputs", StructuredOutputsParams(choice=["x"] * MAX_FIELD_BYTES), "structured_outputs"),
    ],
)
def test_what_each_branch_copies_is_bounded(field: str, value: Any, name: str) -> None:
    check_field_sizes(SamplingParams())
    with pytest.raises(ParamsError, match=rf"got \d+ bytes; at most {MAX_FIELD_BYTES} with a strategy") as caught:
        check_field_sizes(SamplingParams(**{field: value}))
    assert caught.value.field == f"body.{name}"
    check_field_sizes(SamplingParams(extra_args={"any": "x" * (MAX_FIELD_BYTES - 20)}))


def test_others_have_their_turn_between_the_outputs_of_two_steps() -> None:
    """The engine is ahead: its outputs are there at once, and vLLM's handler never waits for them."""
    turns: list[str] = []

    async def get_output_async() -> str:
        turns.append("output")
        return "output"

    async def other(count: int) -> None:
        for _ in range(count):
            turns.append("other")
            await asyncio.sleep(0)

    async def main() -> None:
        client = SimpleNamespace(engine_core=SimpleNamespace(get_output_async=get_output_async))
        give_turns(client)
        others = asyncio.create_task(other(5))
        for _ in range(5):
            assert await client.engine_core.get_output_async() == "output"
        await others

    asyncio.run(main())
    assert turns == ["other", "output"] * 5
