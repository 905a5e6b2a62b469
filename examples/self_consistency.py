"""Let em-serve draw 16 samples of one question and vote (self-consistency), in one HTTP request and without an SDK.

    make serve                             # in another terminal; or give --base-url
    .venv/bin/python examples/self_consistency.py

Prints the reply that won, the votes for each answer, the share of votes that the winner got, how many samples early
stop cancelled or never started, and the tokens of all samples together.
"""

import argparse
import os

import httpx

STRATEGY = {"type": "self_consistency", "n": 16, "parallel": 4, "early_stop": True}


def main() -> None:
    """Ask once and print the outcome of the vote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="the server (default: %(default)s)")
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    with httpx.Client(base_url=parser.parse_args().base_url, headers=headers, timeout=300) as client:
        request = {
            "model": client.get("models").raise_for_status().json()["data"][0]["id"],
            "messages": [{"role": "user", "content": "9-77-2-43-31+4*74"}],
            "temperature": 1,  # above 0, or all samples would be the same
            "seed": 1,  # sample i is drawn with seed + i
            "max_tokens": 128,
            "em_inf": {"threshold": 0.3},
            "strategy": STRATEGY,
        }
        reply = client.post("chat/completions", json=request).raise_for_status().json()

    outcome, usage = reply["strategy"], reply["usage"]
    print(reply["choices"][0]["message"]["content"])
    print(f"votes: {outcome['votes']}, without an answer: {outcome['no_answer']}")
    print(f"answer: {outcome['answer']}, agreement: {outcome['agreement']:.0%}")
    print(f"samples: {outcome['completed']} completed of {outcome['n']}, {outcome['cancelled']} cancelled")
    print(f"usage: {usage['prompt_tokens']} prompt tokens, {usage['completion_tokens']} completion tokens")


if __name__ == "__main__":
    main()
