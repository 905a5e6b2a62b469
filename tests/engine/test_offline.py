"""vLLM's offline `LLM`, without a server, finds the plugin by its entry point."""

import pytest

from tests.engine.launch import offline
from tests.engine.support import STRONG, UNSURE

pytestmark = pytest.mark.engine


def test_llm_honours_extra_args() -> None:
    hot = {"temperature": 2.0, "seed": 1, "max_tokens": 20}
    strong = {"em_inf": STRONG}
    flat = {f"em_inf_{name}": value for name, value in STRONG.items()}
    params = [
        {"temperature": 0.0, "max_tokens": 20},
        hot | {"extra_args": strong},
        hot | {"extra_args": flat},
        hot,
        hot | {"extra_args": {"em_inf": {"threshold": 25}}},
        hot | {"extra_args": strong},
    ]
    greedy, nested, by_flat, plain, refused, again = offline(
        [{"prompt": UNSURE, "params": p} for p in params], runner="v1", with_plugin=True
    )
    assert nested == by_flat == again == greedy
    assert plain != greedy
    assert refused == "em_inf.threshold: got 25; must be a number from 0 up to 20"
