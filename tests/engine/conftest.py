"""One em-serve for each of vLLM's runners, shared by all tests that need no special flags."""

from collections.abc import Iterator

import pytest

from harness.launch import together
from tests.engine.launch import Server, serve

# Small limits, so that long prompts are prefilled in chunks and requests are preempted when the cache is full. On the
# CPU, vLLM 0.32's V1 runner dies if a request with a seed is prefilled in chunks (docs/findings/upstream.md): at any
# time, the requests with a seed have at most 128 prompt tokens together. They also fit into the cache together (15
# blocks of 32 tokens): a preempted request is prefilled again.
STRESS_FLAGS = (
    *("--max-num-batched-tokens", "128"),
    *("--max-num-seqs", "16"),
    *("--num-gpu-blocks-override", "16"),
    *("--block-size", "32"),
    *("--max-logprobs", "-1"),
)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let essential tests run on the V1 runner alone: `make test` starts one engine."""
    for item in items:
        if needs_runner(item, "v2"):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "essential"]


def needs_runner(item: pytest.Item, runner: str) -> bool:
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return params.get("engine") == runner or runner in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def runners(request: pytest.FixtureRequest) -> Iterator[dict[str, Server]]:
    """Start the servers that the selected tests need, together."""
    names = [name for name in ("v1", "v2") if any(needs_runner(item, name) for item in request.session.items)]
    with together(*(serve(*STRESS_FLAGS, runner=name) for name in names)) as servers:
        yield dict(zip(names, servers, strict=True))


@pytest.fixture(scope="session")
def v1(runners: dict[str, Server]) -> Server:
    return runners["v1"]


@pytest.fixture(scope="session")
def v2(runners: dict[str, Server]) -> Server:
    return runners["v2"]


@pytest.fixture(params=["v1", "v2"])
def engine(request: pytest.FixtureRequest) -> Server:
    """Run the test twice: on the server of each runner."""
    server: Server = request.getfixturevalue(request.param)
    return server
