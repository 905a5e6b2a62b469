"""The scripts in examples/ that need vLLM, each run as a newcomer runs it. The others: tests/examples/."""

import ast
from typing import Any

import pytest

from harness.launch import ONE_PROCESS
from tests.engine.launch import Server, environment
from tests.engine.support import run_client_example, run_example

pytestmark = pytest.mark.engine


def test_client(v1: Server) -> None:
    """Each line it prints is about the reply that the server gives to the same request."""

    def ask(**em_inf: Any) -> tuple[str, str]:
        reply: Any = v1.client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "2+7*16-1*46+29+5"}],
            temperature=1,
            seed=1,
            extra_body={"em_inf": em_inf | {"stats": "summary"}},
        )
        [stats] = reply.em_inf
        changed = f"changed {stats['optimized_tokens']} of {stats['tokens']} tokens"
        entropies = f"mean entropy {stats['entropy_before']:.3f} -> {stats['entropy_after']:.3f} nats"
        return reply.choices[0].message.content, f"{changed}, {entropies}"

    expected = [f"threshold {threshold}: {ask(threshold=threshold)[1]}" for threshold in (0.1, 0.3, 1.0)]
    assert run_client_example("client.py", v1) == "\n".join([*expected, *ask(), ""])


def test_offline_vllm() -> None:
    """With the same seeds, EM-INF changes which replies are sampled: without the plugin the two lines were the same."""
    printed = run_example("offline_vllm.py", env=environment("v1", **ONE_PROCESS))
    plain, minimised = (line for line in printed.splitlines() if line.startswith("em_inf="))  # vLLM's log is there too
    assert plain.startswith("em_inf=False: [('")
    assert minimised.startswith("em_inf={'threshold': 0.3}: [('")
    assert ast.literal_eval(minimised.split(": ", 2)[2]) != ast.literal_eval(plain.split(": ", 1)[1])
