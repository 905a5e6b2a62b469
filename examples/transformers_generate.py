"""Use EM-INF in transformers' `generate`, without vLLM: the transform as a logits processor.

    .venv/bin/python examples/transformers_generate.py

Prints the three most frequent answers in 32 samples of the demo model, without and with EM-INF, with the same seed.
"""

from collections import Counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import demo
from em_sampler import EMInfParams
from em_sampler.huggingface import EntropyMinimizer

MESSAGES = [{"role": "user", "content": "2+7*16-1*46+29+5"}]  # 102


def main() -> None:
    """Sample twice with the same seed."""
    model: Any = AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    options: Any = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 96, "num_return_sequences": 32}
    for params in (None, EMInfParams(threshold=0.3)):
        processors = [EntropyMinimizer(params)] if params else []
        torch.manual_seed(1)
        output = model.generate(**prompt, **options, logits_processor=processors)
        replies = tokenizer.batch_decode(output[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = Counter(reply.split("\n")[-1] for reply in replies)
        print(f"em_inf={params and params.threshold}: {answers.most_common(3)}")


if __name__ == "__main__":
    main()
