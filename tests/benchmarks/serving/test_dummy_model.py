"""Written model folders load, with a tokenizer as large as the vocabulary."""

import pytest
from transformers import AutoConfig, AutoTokenizer

from benchmarks.serving import dummy_model
from benchmarks.serving.configs import prompts_of


@pytest.mark.parametrize("size", dummy_model.SIZES)
def test_a_written_model_loads_and_is_as_large_as_its_vocabulary(size, tmp_path):
    dummy_model.write_model_folder(tmp_path, size)
    config, tokenizer = AutoConfig.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.vocab_size == len(tokenizer) == dummy_model.SIZES[size]["vocab_size"]
    assert tokenizer.decode(tokenizer("a + b").input_ids) == "a + b"
    assert all(0 < token < config.vocab_size for prompt in prompts_of(size, 4) for token in prompt)
