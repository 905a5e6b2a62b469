"""Writes vLLM's own log-probabilities of all words at the last tokens of prompts: MODEL PROMPTS.json LAST OUT.npy.

launch.py runs it, without the plugin. PROMPTS.json has a list of token ids for each prompt.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(model: str, prompts: str, last: str, out: str) -> None:
    """Write an array in float32, [prompts * last, vocab]."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    flags = {"enforce_eager": True, "dtype": "float32", "max_model_len": 1024, "enable_chunked_prefill": False}
    llm = LLM(model, max_logprobs=-1, disable_log_stats=True, **flags)  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    rows = []
    for ids in json.loads(Path(prompts).read_text()):
        [answer] = llm.generate(TokensPrompt(prompt_token_ids=ids), params, use_tqdm=False)
        found: Any = answer.prompt_logprobs
        for start, end in list(zip(found.start_indices, found.end_indices, strict=True))[-int(last) :]:
            row = np.empty(llm.model_config.get_vocab_size(), np.float32)
            row[found.token_ids[start:end]] = found.logprobs[start:end]  # by falling probability
            rows.append(row)
    np.save(out, np.array(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
