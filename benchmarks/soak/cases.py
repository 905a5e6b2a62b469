"""Requests for the fuzz, the same for the same seed: our fields alone, and together with vLLM's."""

import random
from collections.abc import Iterator
from typing import Any

from benchmarks.soak.exchange import CHAT, COMPLETIONS, PROMPT, RESPONSES, Case

HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 5.0, 0.5, 1e308, -1e308, 2**31, 2**63, 2**64, -(2**63)),
    *(float("nan"), float("inf"), float("-inf"), "@digits@", "@exponent@", "@deep@"),
    *("", "0.3", "NaN", "x" * 5_000, "\x00", "\ud800", "⅓", [], [0.3], {}, {"a": {"a": {"a": 1}}}),
]
SEEDS: list[Any] = [0, 1, 7, -1, 2**31 - 1, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 1.0, None]
EM_INF: dict[str, list[Any]] = {
    "threshold": [0, 0.1, 0.3, 20],
    "steps": [0, 1, 5, 64],
    "learning_rate": [0.1, 10],
    "kl_weight": [0, 0.001, 10],
    "optimizer": ["adam", "sgd"],
    "method": ["em_inf"],
    "stats": ["none", "summary", "tokens"],
}
ADAPTIVE: dict[str, list[Any]] = {
    "method": ["adaptive_temperature"],
    "ratio": [0, 0.5, 1],
    "threshold": [0, 0.1],
    "min_temperature": [0.001, 0.01],
    "max_temperature": [0.5, 1, 10],
    "stats": ["none", "summary", "tokens"],
}
MEASURE: dict[str, list[Any]] = {"method": ["none"], "stats": ["none", "summary", "tokens"]}
METHODS = (EM_INF, ADAPTIVE, MEASURE)
ANSWERS: list[Any] = [
    *({"type": "boxed"}, {"type": "last_number"}, {"type": "text"}),
    *({"type": "regex", "pattern": pattern} for pattern in ("[0-9]+", "a.*b|.", "(?:.{0,60}){0,15}z|.", "(", "")),
]
STRATEGIES: dict[str, dict[str, list[Any]]] = {
    "self_consistency": {
        "n": [2, 3, 4],
        "parallel": [1, 2],
        "early_stop": [True, False],
        "confidence": [0.6, 0.99],
        "weights": ["equal", "entropy"],
        "answer": ANSWERS,
    },
    "refinement": {"rounds": [2, 3], "answer": ANSWERS},
    "deepconf": {
        "n": [2, 3, 4],
        "warmup": [1, 2],
        "keep": [0.1, 0.9],
        "window": [1, 4, 2048],
        "top": [2, 5, 20],
        "consensus": [0.5, 1],
        "answer": ANSWERS,
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
COMMON: dict[str, list[Any]] = {
    "temperature": [0, 0.7, 1, 2],
    "top_p": [0.1, 0.9, 1e-9],
    "top_k": [1, 3, -1, 0],
    "seed": SEEDS,
}
SAMPLING: dict[str, list[Any]] = COMMON | {
    "n": [1, 2, 4, 0, -1, 100_000],
    "min_p": [0.05, 1],
    "min_tokens": [0, 3, 10_000],
    "ignore_eos": [True, False],
    "stop": ["=", ["1", "2"], "", []],
    "stop_token_ids": [[20], [1_000_000_000], []],
    "include_stop_str_in_output": [True],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [1.5],
    "repetition_penalty": [0.5, 1.5],
    "bad_words": [["1"], [""]],
    "logit_bias": [{"21": -100}, {"22": 100}, {"999999": 1}],
    "allowed_token_ids": [[20, 21], [27], [], [999_999]],
    "structured_outputs": [
        *({"json": SCHEMA}, {"regex": "[0-9]{1,3}"}, {"choice": ["12", "29"]}, {"json": {"$ref": "#"}}, {}, 1.5),
        *({"grammar": "root ::= root"}, {"regex": "("}, {"json": SCHEMA, "regex": "[0-9]"}),
    ],
    "stream_options": [{"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}, {}],
    "priority": [0, 1],
    "user": ["x", 5],
    "request_id": ["same"],
    "truncate_prompt_tokens": [1, -1],
    "skip_special_tokens": [False],
    "return_token_ids": [True],
    "vllm_xargs": [{"x": 1}, {"kv_transfer_params": 1}, {"em_report": "tcp://192.0.2.1:1"}, 5],
    "cache_salt": ["x", ""],
    "unknown_field": [1],
}
VLLM: dict[str, dict[str, list[Any]]] = {
    CHAT: SAMPLING
    | {
        "logprobs": [True, False],
        "top_logprobs": [0, 5, 20, 100],
        "prompt_logprobs": [1],
        "response_format": [{"type": "json_object"}, {"type": "text"}],
        "continue_final_message": [True],
        "add_generation_prompt": [False],
        "tools": [[], [{"type": "function", "function": {"name": "f"}}]],
        "echo": [True],
    },
    COMPLETIONS: SAMPLING
    | {
        "logprobs": [0, 1, 5, 100],
        "echo": [True],
        "suffix": ["x"],
        "prompt": ["", [], [21, 15, 21], ["1+1=", "2+2="], [[999_999]], "1" * 2000],
        "use_beam_search": [True],
        "prompt_logprobs": [1],
    },
    RESPONSES: COMMON
    | {
        "logit_bias": [{"999999": 1}],
        "top_logprobs": [5],
        "include": [["message.output_text.logprobs"]],
        "text": [{"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}],
        "background": [True],
        "store": [False, True],
        "previous_response_id": ["resp_x"],
    },
}
ROUTES = (CHAT, CHAT, CHAT, COMPLETIONS, COMPLETIONS, RESPONSES)


class Cases:
    """An endless series of requests."""

    def __init__(self, seed: int) -> None:
        """Begin the series of `seed`."""
        self.random = random.Random(seed)

    def alone(self) -> Iterator[Case]:
        """Yield requests that have our fields and nothing else that could be wrong."""
        while True:
            path = self.random.choice(ROUTES)
            yield Case(path, self._body(path) | self._ours(path, hostile=0.15), plain=True)

    def combined(self) -> Iterator[Case]:
        """Yield requests that have our fields and some of vLLM's."""
        while True:
            path = self.random.choice(ROUTES)
            body = self._body(path) | self._ours(path, hostile=0.05)
            names = self.random.sample(sorted(VLLM[path]), self.random.randint(1, 4))
            chosen = {name: self.random.choice(VLLM[path][name]) for name in names}
            if "vllm_xargs" in body and isinstance(chosen.get("vllm_xargs"), dict):
                chosen["vllm_xargs"] = chosen["vllm_xargs"] | body["vllm_xargs"]
            if self.random.random() < 0.05:
                chosen[self.random.choice(names)] = self.random.choice(HOSTILE)
            yield Case(path, body | chosen)

    def good(self) -> Iterator[Case]:
        """Yield requests that a server answers with 200, most of them within milliseconds."""
        while True:
            path = self.random.choice((CHAT, CHAT, COMPLETIONS))
            body = self._body(path) | {"seed": self.random.randrange(2**31)}
            if self.random.random() < 0.6:
                body["em_inf"] = self._fields(self.random.choice(METHODS), 0)
            if path == CHAT and self.random.random() < 0.2:
                kind = self.random.choice(["self_consistency", "deepconf"])
                n = {"n": 3} | ({"warmup": 1} if kind == "deepconf" else {})
                body["strategy"] = {"type": kind} | n
            yield Case(path, body, plain=True)

    def _body(self, path: str) -> dict[str, Any]:
        tokens = {"max_output_tokens" if path == RESPONSES else "max_tokens": self.random.choice([2, 6, 12])}
        stream = {"stream": True} if self.random.random() < 0.5 else {}
        return {"model": "demo", "temperature": 1} | PROMPT[path] | tokens | stream

    def _ours(self, path: str, hostile: float) -> dict[str, Any]:
        """Return at least one of our fields; each value is hostile at this rate."""
        forms = ["em_inf", "flat", *(["strategy", "both"] if path == CHAT else [])]
        form = self.random.choice(forms)
        fields: dict[str, Any] = {}
        if form in ("em_inf", "both"):
            fields["em_inf"] = self._settings(hostile)
        if form in ("strategy", "both"):
            fields["strategy"] = self._strategy(hostile)
        if form == "flat":
            settings = self._fields(self.random.choice(METHODS), hostile)
            fields["vllm_xargs"] = {f"em_inf_{name}": value for name, value in settings.items()} or {"em_inf": True}
        return fields

    def _settings(self, hostile: float) -> Any:
        if self.random.random() < hostile / 2:
            return self.random.choice(HOSTILE)
        if self.random.random() < 0.2:
            return self.random.choice([True, False])
        return self._fields(self.random.choice(METHODS), hostile)

    def _strategy(self, hostile: float) -> Any:
        if self.random.random() < hostile / 2:
            return self.random.choice(HOSTILE)
        kind = self.random.choice(sorted(STRATEGIES))
        return {"type": kind} | self._fields(STRATEGIES[kind], hostile)

    def _fields(self, allowed: dict[str, list[Any]], hostile: float) -> dict[str, Any]:
        """Return some of `allowed`, the method if it must be said, and at times a field that does not exist."""
        names = self.random.sample(sorted(allowed), self.random.randint(0, len(allowed)))
        names += ["method"] * (allowed in (ADAPTIVE, MEASURE) and "method" not in names)
        fields = {name: self._value(allowed[name], hostile) for name in names}
        return fields | ({"no_such_field": 1} if self.random.random() < hostile / 4 else {})

    def _value(self, good: list[Any], hostile: float) -> Any:
        return self.random.choice(HOSTILE if self.random.random() < hostile else good)
