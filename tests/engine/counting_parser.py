"""A reasoning parser for the demo model, which has no tokens to think with: every other token counts as reasoning.

It is a plugin for vLLM's --reasoning-parser-plugin. Replies stay as they are.
"""

from collections.abc import Sequence

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.identity_reasoning_parser import IdentityReasoningParser


class EveryOtherToken(IdentityReasoningParser):
    """Counts half of the tokens, rounded up."""

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        return len(token_ids[::2])


ReasoningParserManager.register_module("every_other", module=EveryOtherToken)
