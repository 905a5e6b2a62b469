"""Servers with other flags: several processes, an operator's default and cap, traces, speculation, a pooling model."""

import asyncio
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from benchmarks.soak import exchange
from benchmarks.soak.attacks import Size, disconnects, fuzz_alone, fuzz_combined, slow_readers
from harness.launch import EM_SERVE, START_LIMIT_S, together
from harness.ports import free_port
from tests.engine.drain import DRAIN, check_drain
from tests.engine.launch import API_KEY, ENGINE_FLAGS, Server, environment, serve, started
from tests.engine.prometheus import check_counters, needs_prometheus
from tests.engine.spans import SpanServer
from tests.engine.support import ALL_LOGPROBS, CAPPED, CHAT, EM, UNSURE, check_deepconf, check_stats
from tests.engine.support import complete as complete_all

pytestmark = pytest.mark.engine

NGRAM = ("--speculative-config", json.dumps({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}))


def complete(server: Server, **options: Any) -> str:
    """Return the completion of an unknown prompt, sampled at temperature 2: only a strong method makes it greedy."""
    settings: dict[str, Any] = {"temperature": 2.0, "seed": 3, "max_tokens": 20} | options
    return server.client.completions.create(model="demo", prompt=UNSURE, **settings).choices[0].text


STATISTICS_KEY = secrets.token_hex(32)


class TestTwoMachines:
    """Data-parallel engines on two machines: their servers end before others start."""

    @pytest.fixture(scope="class")
    @classmethod
    def two_machines(cls) -> Iterator[Server]:
        """Run two API servers and two data-parallel engines, with an operator's default and cap.

        The second engine belongs to another em-serve, which has no API server and reaches the first by TCP alone.
        """
        stats_port, rpc_port = free_port(consecutive=2), str(free_port())
        both = ("--em-inf-statistics-address", f"127.0.0.1:{stats_port}", *DRAIN)
        both += ("--data-parallel-size", "2", "--data-parallel-size-local", "1")
        both += ("--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", rpc_port)
        operator = ("--em-inf-default", json.dumps(CAPPED), "--em-inf-max-steps", str(CAPPED["steps"]))
        with (
            started(*both, "--headless", "--data-parallel-start-rank", "1", EM_INF_STATISTICS_KEY=STATISTICS_KEY),
            serve(*both, *operator, "--api-server-count", "2", EM_INF_STATISTICS_KEY=STATISTICS_KEY) as server,
        ):
            yield server

    def test_an_operators_default_and_cap_in_every_api_server(self, two_machines: Server) -> None:
        greedy = complete(two_machines, temperature=0)
        for _ in range(4):  # each on a new connection, which either process may accept
            assert complete(two_machines) == greedy
            assert complete(two_machines, extra_body={"em_inf": False}) != greedy
            assert complete(two_machines, extra_body={"em_inf": True}) == greedy
            with pytest.raises(openai.BadRequestError, match=r"got 8; this server allows an integer from 0 up to 7"):
                complete(two_machines, extra_body={"em_inf": {"steps": 8}})
        supported = two_machines.http.get("/v1/em_inf").json()
        assert supported["default"] == CAPPED | {"method": "em_inf", "optimizer": "adam", "stats": "none", "top": 0}
        assert supported["methods"]["em_inf"]["steps"]["maximum"] == 7
        assert supported["transforms"] == [{"transform": "numba_cpu", "device": "cpu"}]
        info = 'em_inf_transform_info{device="cpu",model="demo",transform="numba_cpu"} 1.0'
        assert info in two_machines.http.get("/metrics").text
        # The cap also holds on routes that we did not rebuild.
        xargs = {"vllm_xargs": {"em_inf_steps": 8}, "max_tokens": 4, "model": "demo"}
        messages = [{"role": "user", "content": "1"}]
        response = two_machines.http.post("/v1/messages", json=xargs | {"messages": messages})
        assert response.status_code == 400
        assert "from 0 up to 7" in response.text

    @needs_prometheus
    def test_data_parallel_engines_report_to_the_server_that_asked(self, two_machines: Server, tmp_path: Path) -> None:
        check_counters(two_machines, tmp_path, requests=24)

    def test_several_api_servers_drain(self, two_machines: Server) -> None:
        """The last test of these servers: it ends them."""
        asyncio.run(check_drain(two_machines))


@pytest.fixture(scope="module")
def spans() -> Iterator[SpanServer]:
    receiver = SpanServer()
    yield receiver
    receiver.shutdown()


@pytest.fixture(scope="module")
def servers(
    request: pytest.FixtureRequest, spans: SpanServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """Start the servers that the selected tests need, together."""
    spans_at_once = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    no_compiler = without_compiler(tmp_path_factory.mktemp("machine"))
    starts = {
        "tensor parallel": serve("--tensor-parallel-size", "2", executor="mp", VLLM_CPU_OMP_THREADS_BIND="0|1"),
        "traced, no compiler": serve(
            *("--otlp-traces-endpoint", spans.endpoint, "--logprobs-mode", "processed_logprobs"),
            **spans_at_once,
            **no_compiler,
        ),
        "pooling": serve("--runner", "pooling"),
        "speculative v1": serve(*NGRAM, runner="v1"),
        "speculative v2": serve(*NGRAM, "--max-logprobs", "-1", runner="v2"),
    }
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    needed = {item.callspec.params.get("server") for item in items}
    names = [name for name in starts if name in needed]
    with together(*(starts[name] for name in names)) as running:
        yield dict(zip(names, running, strict=True))


def without_compiler(folder: Path) -> dict[str, str]:
    """Return variables with which a process finds every program of /usr/bin but compilers; links go into `folder`."""
    compilers = re.compile(r".*(g\+\+|gcc|clang).*|cc|c\+\+|c[89]9.*")
    for tool in Path("/usr/bin").iterdir():
        if not compilers.fullmatch(tool.name):
            (folder / tool.name).symlink_to(tool)
    path = os.pathsep.join([str(Path(sys.executable).parent), str(folder)])
    return {"PATH": path, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}


@pytest.fixture
def server(request: pytest.FixtureRequest, servers: dict[str, Server]) -> Server:
    running: Server = servers[request.param]
    return running


def on(name: str) -> pytest.MarkDecorator:
    """Give a test one of `servers` as `server`."""
    return pytest.mark.parametrize("server", [name], indirect=True)


@on("tensor parallel")
@needs_prometheus
def test_tensor_parallel_ranks_count_once(server: Server, tmp_path: Path) -> None:
    check_counters(server, tmp_path, requests=24)


@on("traced, no compiler")
def test_a_machine_without_a_compiler_answers_with_logprobs(server: Server) -> None:
    assert complete(server, logprobs=2, max_tokens=4)
    assert complete(server, logprobs=2, max_tokens=4, extra_body={"em_inf": True})


@on("traced, no compiler")
def test_the_span_of_a_request_carries_its_summary(server: Server, spans: SpanServer) -> None:
    body = {"model": "demo", "prompt": UNSURE, "max_tokens": 12, "n": 2, "ignore_eos": True, "temperature": 1.5}
    requests = {"summary": {"em_inf": EM | {"stats": "summary"}}, "no-stats": {"em_inf": EM}, "plain": {}}
    responses = {
        name: server.http.post("/v1/completions", json=body | extra, headers={"X-Request-Id": name}).json()
        for name, extra in requests.items()
    }
    server.until(lambda: all(len(spans.spans_of(f"cmpl-{name}")) == 2 for name in requests))

    for summary, span in zip(responses["summary"]["em_inf"], spans.spans_of("cmpl-summary"), strict=True):
        for name, value in summary.items():
            assert span[f"em_inf.{name}"] == value
        assert span["em_inf.method"] == "em_inf"
        assert span["gen_ai.usage.completion_tokens"] == summary["tokens"] == 12
    for span in spans.spans_of("cmpl-no-stats"):  # in the span, although the response has no stats
        assert (span["em_inf.tokens"], span["em_inf.missing"]) == (12, 0)
        assert span["em_inf.optimized_tokens"] > 0
    assert "em_inf" not in responses["no-stats"]
    assert [any(name.startswith("em_inf") for name in span) for span in spans.spans_of("cmpl-plain")] == [False] * 2


@on("traced, no compiler")
def test_requests_with_equal_ids_have_their_own_spans(server: Server, spans: SpanServer) -> None:
    lengths = range(20, 60, 5)

    async def ask_all() -> None:
        async with server.async_http() as client:
            body = {"model": "demo", "prompt": UNSURE, "ignore_eos": True, "temperature": 1.5, "em_inf": EM}
            ask = partial(client.post, "/v1/completions", headers={"X-Request-Id": "same"})
            for response in await asyncio.gather(*(ask(json=body | {"max_tokens": length}) for length in lengths)):
                assert response.status_code == 200, response.text

    asyncio.run(ask_all())
    server.until(lambda: len(spans.spans_of("cmpl-same")) == len(lengths))
    found = spans.spans_of("cmpl-same")
    assert sorted(span["gen_ai.usage.completion_tokens"] for span in found) == list(lengths)
    assert all(span["em_inf.tokens"] == span["gen_ai.usage.completion_tokens"] for span in found)


@on("traced, no compiler")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "mask", [{"top_k": 2}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"structured_outputs": {"regex": "[0-9]{4}"}}]
)
def test_deepconf_goes_with_processed_log_probabilities(server: Server, mask: dict[str, Any], stream: bool) -> None:
    strategy = {"type": "deepconf", "n": 4, "warmup": 2, "window": 2, "consensus": 1.0, "answer": {"type": "text"}}
    body = {"model": "demo", "messages": CHAT, "temperature": 2, "seed": 3, "max_tokens": 8, "stream": stream}
    response = server.http.post("/v1/chat/completions", json=body | {"strategy": strategy} | mask)
    assert response.status_code == 200, response.text
    check_deepconf(response.text, stream)


@on("traced, no compiler")
def test_a_short_soak_is_withstood(server: Server) -> None:
    """What `make soak` sends, in small numbers; how fast probes are answered is for `make soak` to judge."""
    target = exchange.Target(server.url, server.pid, API_KEY)
    fuzzed = [fuzz_alone(target, Size(150)), fuzz_combined(target, Size(150))]
    left = [disconnects(target, Size(40)), slow_readers(target, Size(20))]
    assert [problem for row in (*fuzzed, *left) for problem in row.problems] == []
    for row in fuzzed:
        assert min(row.counts[exchange.ANSWERED], row.counts[exchange.REFUSED]) > 20
    assert sum(row.counts[exchange.GONE] for row in left) == 60


@on("pooling")
def test_a_pooling_model_refuses_em_inf(server: Server) -> None:
    body = {"model": "demo", "input": "12+7"}
    assert server.http.post("/v1/embeddings", json=body).status_code == 200
    response = server.http.post("/v1/embeddings", json=body | {"em_inf": {"threshold": 0.3}})
    assert response.status_code == 400
    assert "pooling model samples no tokens" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "body.em_inf"


@on("speculative v1")
def test_v1_with_speculative_decoding_refuses_em_inf(server: Server) -> None:
    assert complete(server, temperature=0)
    with pytest.raises(openai.BadRequestError, match="speculative decoding") as caught:
        complete(server, extra_body={"em_inf": True})
    assert caught.value.param == "body.em_inf"
    assert complete(server, temperature=0, extra_body={"em_inf": False})
    assert server.http.get("/v1/em_inf").json()["available"] is False


@on("speculative v2")
def test_v2_with_speculative_decoding_honours_em_inf(server: Server) -> None:
    """Every row of a draft gets its request's method: accepted tokens and their replacements are greedy."""
    greedy = complete(server, temperature=0, max_tokens=40)
    assert complete(server, max_tokens=40, extra_body={"em_inf": CAPPED | {"steps": 64}}) == greedy
    assert complete(server, max_tokens=40) != greedy
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") > 0

    # Each token of a draft has a row. A rejected one is sampled again, and counted once.
    methods: list[Any] = [EM, {"method": "none"}]
    shared = {"max_tokens": 25, "ignore_eos": True, "temperature": 0.7} | ALL_LOGPROBS
    bodies = [
        shared | {"prompt": "12+12+12+12+Q" * (1 + i % 3), "em_inf": methods[i % 2] | {"stats": "tokens"}}
        for i in range(6)
    ]
    accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total")
    responses = complete_all(server, *bodies)
    checked = (check_stats(response, body["em_inf"]) for response, body in zip(responses, bodies, strict=True))
    assert sum(checked) == 150
    assert server.metric("vllm:spec_decode_num_accepted_tokens_total") > accepted


# Flags, environment variables, and a part of the last line on standard error; tests/server/test_cli.py has the rest.
REFUSED: list[tuple[list[str], dict[str, str], str]] = [
    (["--grpc"], {}, "without this server's routes"),
    ([], {"VLLM_USE_RUST_FRONTEND": "1"}, "unset it"),
    (["--logits-processors", "em_sampler.vllm_plugin.processor:EMInfLogitsProcessor"], {}, "drop it"),
]


@pytest.mark.parametrize(("flags", "variables", "message"), REFUSED)
def test_flags_that_cannot_work_stop_the_start_with_one_line(
    flags: list[str], variables: dict[str, str], message: str
) -> None:
    done = subprocess.run(
        [*EM_SERVE, *flags, *ENGINE_FLAGS],
        env=environment("v1", **variables),
        capture_output=True,
        text=True,
        timeout=START_LIMIT_S,
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
