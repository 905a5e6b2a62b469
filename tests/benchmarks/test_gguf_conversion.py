"""The tokenizer of a converted model: how it splits text, and what is refused."""

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from benchmarks.gguf_conversion import CHAT_TOKENS, check, split_as_trained

SPACE = "Ġ"  # as byte-level tokenizers write it
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), SPACE * 2, *CHAT_TOKENS]


def tokenizer(tokens: list[str] = TOKENS, template: str | None = "{{ messages }}") -> PreTrainedTokenizerFast:
    """Return one of single bytes and two spaces, split as transformers does without `tokenizer.ggml.pre`."""
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab, [(SPACE, SPACE)]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    present = [token for token in CHAT_TOKENS if token in vocab]
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=present, eos_token=CHAT_TOKENS[1]
    )
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("name", "tokens"), [("smollm", ["=", SPACE * 2, "4", "2"]), ("qwen2", ["=", SPACE, SPACE, "4", "2"])]
)
def test_white_space_before_a_number_is_split_as_the_file_says(name: str, tokens: list[str]) -> None:
    ours = tokenizer()
    split_as_trained(ours, name)
    assert ours.tokenize("=  42") == tokens


def test_a_tokenizer_that_fits_passes() -> None:
    ours = tokenizer()
    check(ours, len(TOKENS), ours.eos_token_id)


def test_more_tokens_than_the_model_has_are_refused() -> None:
    with pytest.raises(ValueError, match="the tokenizer has 259 tokens; must be at most the model's 258"):
        check(tokenizer(), 258, len(TOKENS) - 1)


def test_a_tokenizer_that_loses_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="does not give a text back"):
        check(tokenizer([token for token in TOKENS if token != "Ã"]), 300, 0)  # the first byte of ï


def test_a_token_of_the_template_in_pieces_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the tokenizer has no token <\|im_start\|>"):
        check(tokenizer([token for token in TOKENS if token != "<|im_start|>"]), 300, 0)


@pytest.mark.parametrize(("template", "off"), [(None, 0), ("{{ messages }}", 1)])
def test_a_model_without_a_template_or_end_is_refused(template: str | None, off: int) -> None:
    ours = tokenizer(template=template)
    with pytest.raises(ValueError, match="no chat template, or no token that ends a reply"):
        check(ours, 300, ours.eos_token_id - off)
