"""Use EM-INF in vLLM's offline `LLM`, without a server: vLLM finds the plugin when em-inf-server is installed.

    VLLM_CPU_KVCACHE_SPACE=1 .venv/bin/python examples/offline_vllm.py

Prints the three most frequent answers in 16 samples of the demo model, without and with EM-INF, with the same seeds.
Takes half a minute, most of it vLLM's start. The variable is in GiB: without it, vLLM on CPUs takes nearly all memory.
"""

from collections import Counter
from typing import Any

from vllm import LLM, SamplingParams

import demo

MESSAGES: Any = [{"role": "user", "content": "2+7*16-1*46+29+5"}]  # 102

if __name__ == "__main__":  # vLLM may start its engine as a process that imports this file again
    # In chunked prefill, vLLM 0.32's V1 runner on the CPU dies if a request has a seed (docs/findings/upstream.md).
    llm = LLM(str(demo.MODEL_PATH), max_model_len=256, enforce_eager=True, enable_chunked_prefill=False)
    for em_inf in (False, {"threshold": 0.3}):
        params = SamplingParams(n=16, temperature=1, seed=1, max_tokens=128, extra_args={"em_inf": em_inf})
        [request] = llm.chat(MESSAGES, params, use_tqdm=False)
        answers = Counter(sample.text.split("\n")[-1] for sample in request.outputs)
        print(f"em_inf={em_inf}: {answers.most_common(3)}")
