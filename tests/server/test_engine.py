"""The wrapped engine client: where stats are sent, how tokens are counted, and what a branch differs in."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.parallel_sampling import ParentRequest

from em_sampler.params import RETURN_ADDRESS_KEY
from em_sampler.stats.aggregator import ReturnAddress
from em_sampler.stats.transport import SOCKET_DIR_ENV, socket_dir
from server.engine import EngineBranches, install_stats, request_stats_var
from server.stats.collector import RequestStats
from server.stats.metrics import Metrics

SOCKET_NAME = "0" * 32 + ".0"
FORGED = {RETURN_ADDRESS_KEY: [SOCKET_NAME, 1, 0, True]}


class Engine:
    """An engine client that remembers its requests and yields two outputs of one token for each."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(_api_process_rank=3))
        self.model_config = SimpleNamespace(max_logprobs=20)
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
    first, is_delta, _, stats = request.branch(0, None, 0, False)
    second, is_delta_too, _, other_stats = request.branch(1, "refined", 20, True)
    assert request_stats_var.get() is None
    request_stats_var.reset(token)
    assert (first, second) == ("id-0", "id-1") and stats is not other_stats
    assert (is_delta, is_delta_too) == (False, True)
    assert [(prompt, params.seed, params.logprobs) for _, prompt, params in engine.requests] == [
        ("prompt", 2**63 - 1, 0),
        ("refined", -(2**63), 20),
    ]
    assert own.seed == 2**63 - 1 and own.logprobs is None
