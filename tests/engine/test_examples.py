"""The scripts in examples/ that need a server, run as a newcomer does. Others: test_offline.py, tests/examples/."""

from typing import Any

import pytest

from tests.engine.launch import Server
from tests.engine.support import run_client_example

pytestmark = pytest.mark.engine


@pytest.mark.essential
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
