"""Servers with other flags: several processes, an operator's default and cap, speculative decoding, a pooling model."""

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

from harness.launch import EM_SERVE, START_LIMIT_S, together
from harness.ports import free_port
from tests.engine.drain import DRAIN, check_drain
from tests.engine.launch import ENGINE_FLAGS, Server, environment, serve, started
from tests.engine.prometheus import check_counters, needs_prometheus
from tests.engine.support import ALL_LOGPROBS, CAPPED, EM, UNSURE, check_stats
from tests.engine.support import complete as complete_all

pytestmark = pytest.mark.engine

NGRAM = ("--speculative-config", json.dumps({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}))


@pytest.fixture(scope="module")
def several() -> Iterator[Server]:
    """Run two API servers in front of a tensor-parallel engine, with an operator's default and cap."""
    parallel = ("--api-server-count", "2", "--tensor-parallel-size", "2")
    operator = ("--em-inf-default", json.dumps(CAPPED), "--em-inf-max-steps", str(CAPPED["steps"]))
    with serve(*parallel, *operator, executor="mp", VLLM_CPU_OMP_THREADS_BIND="0|1") as server:
        yield server


@needs_prometheus
def test_several_api_servers_and_tensor_parallel_ranks_count_once(several: Server, tmp_path: Path) -> None:
    check_counters(several, tmp_path, requests=24)


def complete(server: Server, **options: Any) -> str:
    """Return the completion of an unknown prompt, sampled at temperature 2: only a strong method makes it greedy."""
    settings: dict[str, Any] = {"temperature": 2.0, "seed": 3, "max_tokens": 20} | options
    return server.client.completions.create(model="demo", prompt=UNSURE, **settings).choices[0].text


def test_an_operators_default_and_cap_in_every_api_server(several: Server) -> None:
    greedy = complete(several, temperature=0)
    for _ in range(6):  # each on a new connection, which either process may accept
        assert complete(several) == greedy
        assert complete(several, extra_body={"em_inf": False}) != greedy
        assert complete(several, extra_body={"em_inf": True}) == greedy
        with pytest.raises(openai.BadRequestError, match=r"got 8; this server allows an integer from 0 up to 7"):
            complete(several, extra_body={"em_inf": {"steps": 8}})
    supported = several.http.get("/v1/em_inf").json()
    assert supported["default"] == CAPPED | {"method": "em_inf", "optimizer": "adam", "stats": "none"}
    assert supported["methods"]["em_inf"]["steps"]["maximum"] == 7
    # The cap also holds on routes that we did not rebuild.
    xargs = {"vllm_xargs": {"em_inf_steps": 8}, "max_tokens": 4, "model": "demo"}
    messages = [{"role": "user", "content": "1"}]
    response = several.http.post("/v1/messages", json=xargs | {"messages": messages})
    assert response.status_code == 400
    assert "from 0 up to 7" in response.text


@needs_prometheus
def test_data_parallel_engines_of_two_machines_report_to_the_server_that_asked(tmp_path: Path) -> None:
    """The second engine belongs to another em-serve, which has no API server and reaches the first by TCP alone."""
    stats_port, rpc_port = free_port(consecutive=2), str(free_port())
    both = ("--em-inf-statistics-address", f"127.0.0.1:{stats_port}", *DRAIN)
    both += ("--data-parallel-size", "2", "--data-parallel-size-local", "1")
    both += ("--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", rpc_port)
    with (
        started(*both, "--headless", "--data-parallel-start-rank", "1"),
        serve(*both, "--api-server-count", "2") as server,
    ):
        check_counters(server, tmp_path, requests=24)
        asyncio.run(check_drain(server))


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Run two servers, started together: on a machine without a compiler, and with a pooling model."""
    folder = tmp_path_factory.mktemp("machine")
    compilers = re.compile(r".*(g\+\+|gcc|clang).*|cc|c\+\+|c[89]9.*")
    names = {tool.name for tool in Path("/usr/bin").iterdir() if not compilers.fullmatch(tool.name)}
    for name in names:
        (folder / name).symlink_to(Path("/usr/bin", name))
    path = os.pathsep.join([str(Path(sys.executable).parent), str(folder)])
    without_compiler = serve(executor="mp", PATH=path, TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"))
    with together(without_compiler, serve("--runner", "pooling")) as servers:
        yield servers


def test_a_machine_without_a_compiler_answers_with_logprobs(special: list[Server]) -> None:
    server, _ = special
    assert complete(server, logprobs=2, max_tokens=4)
    assert complete(server, logprobs=2, max_tokens=4, extra_body={"em_inf": True})


def test_a_pooling_model_refuses_em_inf(special: list[Server]) -> None:
    _, server = special
    body = {"model": "demo", "input": "12+7"}
    assert server.http.post("/v1/embeddings", json=body).status_code == 200
    response = server.http.post("/v1/embeddings", json=body | {"em_inf": {"threshold": 0.3}})
    assert response.status_code == 400
    assert "pooling model samples no tokens" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "body.em_inf"


@pytest.fixture(scope="module")
def speculative() -> Iterator[list[Server]]:
    """Run two servers with speculative decoding: on V1 and on V2."""
    with together(*(serve(*NGRAM, "--max-logprobs", "-1", runner=runner) for runner in ("v1", "v2"))) as servers:
        yield servers


def test_v1_with_speculative_decoding_refuses_em_inf(speculative: list[Server]) -> None:
    server, _ = speculative
    assert complete(server, temperature=0)
    with pytest.raises(openai.BadRequestError, match="speculative decoding") as caught:
        complete(server, extra_body={"em_inf": True})
    assert caught.value.param == "body.em_inf"
    assert complete(server, temperature=0, extra_body={"em_inf": False})
    assert server.http.get("/v1/em_inf").json()["available"] is False


def test_v2_with_speculative_decoding_honours_em_inf(speculative: list[Server]) -> None:
    """Every row of a draft gets its request's method: accepted tokens and their replacements are greedy."""
    _, server = speculative
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


# Flags, environment variables, and a part of the last line on standard error.
REFUSED: list[tuple[list[str], dict[str, str], str]] = [
    (["--em-inf-default", '{"threshold": 21}'], {}, "got 21; must be a number from 0 up to 20"),
    (["--em-inf-default", "{threshold"], {}, "argument --em-inf-default"),
    (["--em-inf-default", '{"steps": 9}', "--em-inf-max-steps", "8"], {}, "got 9; this server allows"),
    (["--em-inf-max-steps", "65"], {}, "--em-inf-max-steps"),
    ([], {"VLLM_USE_RUST_FRONTEND": "1"}, "unset it"),
    (["--grpc"], {}, "without this server's routes"),
    (["--logits-processors", "em_sampler.vllm_plugin.processor:EMInfLogitsProcessor"], {}, "drop it"),
]


def test_flags_that_cannot_work_stop_the_start_with_one_line() -> None:
    def start(case: tuple[list[str], dict[str, str], str]) -> subprocess.CompletedProcess[str]:
        flags, variables, _ = case
        return subprocess.run(
            [*EM_SERVE, *flags, *ENGINE_FLAGS],
            env=environment("v1", **variables),
            capture_output=True,
            text=True,
            timeout=START_LIMIT_S,
            check=False,
        )

    with ThreadPoolExecutor(2) as pool:  # each imports vLLM first, which takes one core
        ended = list(pool.map(start, REFUSED))
    for (_, _, message), done in zip(REFUSED, ended, strict=True):
        assert done.returncode != 0
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
