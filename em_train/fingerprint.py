"""Whose token ids a file has: tokenizers that encode a text of many kinds alike are taken for the same one."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

PROBE = "Entropy: 12 + 3.5 = 15.5; \"naïve\" Über, Ж, 日本語, 😀\n\tdef f(x):\n    return x**2  # <b> & 'q'"


def fingerprint(probe_ids: Sequence[int]) -> str:
    """Return the fingerprint of the tokenizer that encodes PROBE, without special tokens, as these ids."""
    return hashlib.sha256(json.dumps(list(probe_ids)).encode()).hexdigest()[:16]


def fingerprint_of(tokenizer: Any) -> str:
    """Return the fingerprint of a tokenizer in this process."""
    return fingerprint(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
