"""One em-serve for each of vLLM's runners, shared by all tests that need no special flags."""

from collections.abc import Iterator

import pytest

from harness.launch import together
from tests.engine.launch import Server, serve

# Small limits, so that long prompts are prefilled in chunks and requests are preempted when the cache is full. On the
# CPU, vLLM 0.32's V1 runner dies if a request with a seed is prefilled in chunks (docs/findings/upstream.md): at any
# time, the requests with a seed have at most 128 prompt tokens together.
STRESS_FLAGS = (
    *("--max-num-batched-tokens", "128"),
    *("--max-num-seqs", "16"),
    *("--num-gpu-blocks-override", "16"),
    *("--block-size", "32"),
    *("--max-logprobs", "-1"),
)


@pytest.fixture(scope="session")
def runners() -> Iterator[list[Server]]:
    with together(*(serve(*STRESS_FLAGS, runner=runner) for runner in ("v1", "v2"))) as servers:
        yield servers


@pytest.fixture(scope="session")
def v1(runners: list[Server]) -> Server:
    return runners[0]


@pytest.fixture(scope="session")
def v2(runners: list[Server]) -> Server:
    return runners[1]


@pytest.fixture(params=["v1", "v2"])
def engine(request: pytest.FixtureRequest) -> Server:
    """Run the test twice: on the server of each runner."""
    server: Server = request.getfixturevalue(request.param)
    return server
