"""Reads vLLM's own token counters from the text of /metrics (Prometheus). No input or output."""

import math
import re

GENERATED, PROMPTED = "vllm:generation_tokens_total", "vllm:prompt_tokens_total"
_SAMPLE = re.compile(r"(\S+?)(?:\{.*\})?[ \t]+(\S+)(?:[ \t]+\S+)?[ \t]*")  # name, labels, value, time


def counted_tokens(text: str) -> tuple[int, int] | None:
    """Return output and prompt tokens, over all labels; None if the server does not count them, or not in numbers."""
    sums = dict.fromkeys((GENERATED, PROMPTED), 0.0)
    found = False
    for line in text.splitlines():
        if not line.startswith((GENERATED, PROMPTED)):
            continue
        sample = _SAMPLE.fullmatch(line)
        if sample and sample[1] in sums:
            found = True
            sums[sample[1]] += _number(sample[2])
    if not found or not all(map(math.isfinite, sums.values())):
        return None
    return round(sums[GENERATED]), round(sums[PROMPTED])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
