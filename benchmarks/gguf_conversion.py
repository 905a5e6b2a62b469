"""Converts a GGUF file into a Hugging Face folder in bfloat16: GGUF FOLDER. real_models.py runs it.

Needs the package `gguf` on the path.
"""

import sys
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")  # the templates of both models are made of them

# How text is split before the merges, by GGUF's `tokenizer.ggml.pre`, which transformers 5.19 does not read.
# llama.cpp's `smollm` takes each digit alone first, so that white space before a number is one token.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
}
# Characters of one, two, three and four bytes, and white space: what a byte-level tokenizer must give back.
SAMPLE = "naïve 日本語 🙂 code\n\tx"


def main(gguf: str, folder: str) -> None:
    """Convert.

    Raises:
        ValueError: if the tokenizer does not fit, or the model would not stop at the end of a reply.
    """
    from gguf import GGUFReader  # here, so that tests of `check` need no `gguf`

    file, made = Path(gguf), Path(folder)
    source = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)  # all that transformers makes of GGUF
    split_as_trained(tokenizer, GGUFReader(file).fields["tokenizer.ggml.pre"].contents())
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **source
    )
    check(tokenizer, model.config.vocab_size, model.generation_config.eos_token_id)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    for path in made.iterdir():
        path.chmod(0o644)  # the weights come out readable by their owner alone


def split_as_trained(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Let a tokenizer split text as the one did that the model was trained with; `name` is GGUF's."""
    if name in PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]


def check(tokenizer: PreTrainedTokenizerFast, vocab: int, end: int) -> None:
    """Check a tokenizer against its model's vocabulary and the token that ends a reply.

    Raises:
        ValueError: if they do not fit, or the tokenizer does not give a text back.
    """
    if len(tokenizer) > vocab:
        raise ValueError(f"the tokenizer has {len(tokenizer):,} tokens; must be at most the model's {vocab:,}")
    if tokenizer.decode(tokenizer(SAMPLE)["input_ids"]) != SAMPLE:
        raise ValueError("the tokenizer does not give a text back")
    for token in CHAT_TOKENS:
        if len(tokenizer(token)["input_ids"]) != 1:
            raise ValueError(f"the tokenizer has no token {token}")
    if not tokenizer.chat_template or end != tokenizer.eos_token_id:
        raise ValueError("the model has no chat template, or no token that ends a reply")


if __name__ == "__main__":
    main(*sys.argv[1:])
