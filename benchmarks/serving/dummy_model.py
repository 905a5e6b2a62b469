"""Writes model folders without weights for `--load-format dummy`: a Qwen2 config and a tokenizer of the same size.

Nothing is downloaded. The tokenizer has a token for each byte, and fills its vocabulary with tokens that no text has.
"""

from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config, Qwen2Tokenizer

END = "<|endoftext|>"
COMMON: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "dtype": "bfloat16",
    "max_position_embeddings": 4096,
    "eos_token_id": 0,
    "pad_token_id": 0,
    # For the weights that transformers draws. vLLM's dummy weights are as small: the rows of both models are flat.
    "initializer_range": 1e-3,
}
SIZES: dict[str, dict[str, Any]] = {
    # Qwen2's vocabulary on layers that cost almost nothing: nearly all of the time is the last layer and the sampler.
    "vocab151k": {
        "vocab_size": 151_936,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # Qwen2.5-0.5B, the smallest model in use with this vocabulary.
    "0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # Qwen2.5-7B.
    "7b": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
}


def write_model_folder(folder: Path, size: str) -> None:
    """Write config.json and the tokenizer's files; `size` is one of SIZES."""
    config = Qwen2Config(**COMMON, **SIZES[size])
    config.save_pretrained(folder)
    _tokenizer(config.vocab_size).save_pretrained(folder)


def _tokenizer(vocab_size: int) -> Qwen2Tokenizer:
    alphabet = [END, *sorted(ByteLevel.alphabet())]
    tokens = [*alphabet, *(f"<{index}>" for index in range(len(alphabet), vocab_size))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=END, pad_token=END, unk_token=END)
