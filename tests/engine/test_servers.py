"""Servers of other make: an operator's default and cap, speculative decoding, a pooling model."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from harness.launch import together
from harness.ports import free_port
from tests.engine.drain import stops_in_good_order
from tests.engine.launch import ENGINE_FLAGS, START_LIMIT_S, Server, environment, serve, started
from tests.engine.prometheus import counters_are_the_sums_over_the_replies, needs_prometheus
from tests.engine.support import ALL_LOGPROBS, CAPPED, EM, check
from tests.engine.support import complete as complete_all

pytestmark = pytest.mark.engine

NGRAM = ("--speculative-config", json.dumps({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}))


@pytest.fixture(scope="module")
def several() -> Iterator[Server]:
    """Two API servers before a tensor-parallel engine, with an operator's default and cap."""
    parallel = ("--api-server-count", "2", "--tensor-parallel-size", "2")
    operator = ("--em-inf-default", json.dumps(CAPPED), "--em-inf-max-steps", str(CAPPED["steps"]))
    with serve(*parallel, *operator, executor="mp", VLLM_CPU_OMP_THREADS_BIND="0|1") as server:
        yield server


@needs_prometheus
def test_several_api_servers_and_tensor_parallel_ranks_count_once(several: Server, tmp_path: Path) -> None:
    counters_are_the_sums_over_the_replies(several, tmp_path, requests=24)


def complete(server: Server, **options: Any) -> str:
    """A completion of what the model was not trained on, hot: only a strong method makes it greedy."""
    settings: dict[str, Any] = {"temperature": 2.0, "seed": 3, "max_tokens": 20} | options
    return server.client.completions.create(model="demo", prompt="Q", **settings).choices[0].text


def test_an_operators_default_and_cap_in_every_api_server(several: Server) -> None:
    greedy = complete(several, temperature=0)
    for _ in range(6):  # a new connection each time: either process may answer
        assert complete(several) == greedy
        assert complete(several, extra_body={"em_inf": False}) != greedy
        assert complete(several, extra_body={"em_inf": True}) == greedy
        with pytest.raises(openai.BadRequestError, match=r"got 8; this server allows an integer from 0 up to 7"):
            complete(several, extra_body={"em_inf": {"steps": 8}})
    supported = several.http.get("/v1/em_inf").json()
    assert supported["default"] == CAPPED | {"method": "em_inf", "optimizer": "adam", "stats": "none"}
    assert supported["methods"]["em_inf"]["steps"]["maximum"] == 7
    # The cap also holds where our routes are not in the way.
    xargs = {"vllm_xargs": {"em_inf_steps": 8}, "max_tokens": 4, "model": "demo"}
    messages = [{"role": "user", "content": "1"}]
    answer = several.http.post("/v1/messages", json=xargs | {"messages": messages})
    assert answer.status_code == 400
    assert "from 0 up to 7" in answer.text


@needs_prometheus
def test_data_parallel_engines_of_two_machines_report_to_the_server_that_asked(tmp_path: Path) -> None:
    """The second engine is another em-serve's, which has no API server and meets the first by TCP alone."""
    statistics, meeting = free_port(consecutive=2), str(free_port())
    both = ("--em-inf-statistics-address", f"127.0.0.1:{statistics}", "--shutdown-timeout", "60")
    both += ("--data-parallel-size", "2", "--data-parallel-size-local", "1")
    both += ("--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", meeting)
    with (
        started(*both, "--headless", "--data-parallel-start-rank", "1"),
        serve(*both, "--api-server-count", "2") as server,
    ):
        counters_are_the_sums_over_the_replies(server, tmp_path, requests=24)
        asyncio.run(stops_in_good_order(server))


def test_a_machine_without_a_compiler_answers_with_logprobs(tmp_path: Path) -> None:
    compilers = re.compile(r".*(g\+\+|gcc|clang).*|cc|c\+\+|c[89]9.*")
    names = {tool.name for tool in Path("/usr/bin").iterdir() if not compilers.fullmatch(tool.name)}
    for name in names:
        (tmp_path / name).symlink_to(Path("/usr/bin", name))
    path = os.pathsep.join([str(Path(sys.executable).parent), str(tmp_path)])
    with serve(executor="mp", PATH=path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")) as server:
        assert complete(server, logprobs=2, max_tokens=4)
        assert complete(server, logprobs=2, max_tokens=4, extra_body={"em_inf": True})


@pytest.fixture(scope="module")
def drafting() -> Iterator[list[Server]]:
    """Speculative decoding on both runners."""
    with together(*(serve(*NGRAM, "--max-logprobs", "-1", runner=runner) for runner in ("v1", "v2"))) as servers:
        yield servers


def test_v1_with_speculative_decoding_refuses_em_inf(drafting: list[Server]) -> None:
    server, _ = drafting
    assert complete(server, temperature=0)
    with pytest.raises(openai.BadRequestError, match="speculative decoding") as caught:
        complete(server, extra_body={"em_inf": True})
    assert caught.value.param == "body.em_inf"
    assert complete(server, temperature=0, extra_body={"em_inf": False})
    assert server.http.get("/v1/em_inf").json()["available"] is False


def test_v2_with_speculative_decoding_honours_em_inf(drafting: list[Server]) -> None:
    """Every row of a draft gets its request's method: what is accepted and what replaces it are greedy."""
    _, server = drafting
    greedy = complete(server, temperature=0, max_tokens=40)
    assert complete(server, max_tokens=40, extra_body={"em_inf": CAPPED | {"steps": 64}}) == greedy
    assert complete(server, max_tokens=40) != greedy
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") > 0

    # A draft's tokens each have a row; what is rejected is sampled again, and counted once.
    arms: list[Any] = [EM, {"method": "none"}]
    shared = {"max_tokens": 25, "ignore_eos": True, "temperature": 0.7} | ALL_LOGPROBS
    bodies = [
        shared | {"prompt": "12+12+12+12+Q" * (1 + i % 3), "em_inf": arms[i % 2] | {"stats": "tokens"}}
        for i in range(6)
    ]
    accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total")
    answers = complete_all(server, *bodies)
    assert sum(check(answer, body["em_inf"]) for answer, body in zip(answers, bodies, strict=True)) == 150
    assert server.metric("vllm:spec_decode_num_accepted_tokens_total") > accepted


def test_a_pooling_model_refuses_em_inf() -> None:
    with serve("--runner", "pooling") as server:
        body = {"model": "demo", "input": "12+7"}
        assert server.http.post("/v1/embeddings", json=body).status_code == 200
        answer = server.http.post("/v1/embeddings", json=body | {"em_inf": {"threshold": 0.3}})
        assert answer.status_code == 400
        assert "pooling model samples no tokens" in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "body.em_inf"


REFUSED: list[tuple[list[str], dict[str, str], str]] = [
    (["--em-inf-default", '{"threshold": 21}'], {}, "got 21; must be a number from 0 up to 20"),
    (["--em-inf-default", "{threshold"], {}, "argument --em-inf-default"),
    (["--em-inf-default", '{"steps": 9}', "--em-inf-max-steps", "8"], {}, "got 9; this server allows"),
    (["--em-inf-max-steps", "65"], {}, "--em-inf-max-steps"),
    ([], {"VLLM_USE_RUST_FRONTEND": "1"}, "unset it"),
    (["--grpc"], {}, "without this server's routes"),
    (["--logits-processors", "em_sampler.vllm_plugin.processor:EMInfLogitsProcessor"], {}, "drop it"),
]


def test_what_cannot_work_stops_the_start_with_one_line() -> None:
    def start(case: tuple[list[str], dict[str, str], str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "server.cli", *case[0], *ENGINE_FLAGS],
            env=environment("v1", **case[1]),
            capture_output=True,
            text=True,
            timeout=START_LIMIT_S,
            check=False,
        )

    with ThreadPoolExecutor(2) as pool:  # each has to import vLLM first
        ended = list(pool.map(start, REFUSED))
    for (_, _, says), done in zip(REFUSED, ended, strict=True):
        assert done.returncode != 0
        assert says in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
