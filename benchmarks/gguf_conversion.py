"""Converts a GGUF file into a Hugging Face folder in bfloat16: GGUF FOLDER. real_models.py runs it.

Needs the package `gguf` on the path.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

# Characters of one, two, three and four bytes, and white space: what a byte-level tokenizer must give back.
SAMPLE = "naïve 日本語 🙂 code\n\tx"


def main(gguf: str, folder: str) -> None:
    """Convert.

    Raises:
        ValueError: if the tokenizer does not give a text back, or the model would not stop at the end of a reply.
    """
    file, made = Path(gguf), Path(folder)
    source = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **source
    )
    if tokenizer.decode(tokenizer(SAMPLE)["input_ids"]) != SAMPLE:
        raise ValueError("the tokenizer does not give a text back")
    if not tokenizer.chat_template or model.generation_config.eos_token_id != tokenizer.eos_token_id:
        raise ValueError("the model has no chat template, or no token that ends a reply")
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    for path in made.iterdir():
        path.chmod(0o644)  # the weights come out readable by their owner alone


if __name__ == "__main__":
    main(*sys.argv[1:])
