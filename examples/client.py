"""Ask a running em-serve for EM-INF with the official openai client: one threshold per request, entropies, a stream.

    make serve                             # in another terminal; or give --base-url
    .venv/bin/python examples/client.py

Prints one line for each threshold (the entropy in nats below which a token is left alone), with the tokens that EM-INF
changed and the mean entropies before and after. Then streams a reply and prints its entropies, which come last.
"""

import argparse
import os
from typing import Any

from openai import OpenAI

MESSAGES: Any = [{"role": "user", "content": "2+7*16-1*46+29+5"}]


def describe(stats: dict[str, Any]) -> str:
    """Return the summary of one choice as text."""
    changed = f"changed {stats['optimized_tokens']} of {stats['tokens']} tokens"
    return f"{changed}, mean entropy {stats['entropy_before']:.3f} -> {stats['entropy_after']:.3f} nats"


def main() -> None:
    """Ask with three thresholds, then stream one reply."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="the server (default: %(default)s)")
    base_url = parser.parse_args().base_url
    client = OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    request: Any = {"model": client.models.list().data[0].id, "messages": MESSAGES, "temperature": 1, "seed": 1}

    for threshold in (0.1, 0.3, 1.0):
        em_inf = {"threshold": threshold, "stats": "summary"}
        reply: Any = client.chat.completions.create(**request, extra_body={"em_inf": em_inf})
        print(f"threshold {threshold}: {describe(reply.em_inf[0])}")

    for chunk in client.chat.completions.create(**request, stream=True, extra_body={"em_inf": {"stats": "summary"}}):
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif "em_inf" in (chunk.model_extra or {}):  # the last chunk
            print(f"\n{describe(chunk.em_inf[0])}")


if __name__ == "__main__":
    main()
