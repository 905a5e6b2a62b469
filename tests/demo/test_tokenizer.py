"""The shipped tokenizer: one token for each byte, exact round trips, the chat template."""

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from demo import MODEL_PATH
from demo.tokenizer import CHAT_TEMPLATE, END_ID, PAD_ID, SPECIAL, VOCABULARY, build_tokenizer, turn

PRINTABLE = "\n" + "".join(chr(code) for code in range(32, 127))
USER: dict[str, Any] = {"role": "user", "content": "1+2"}
# As a server loads it.
SHIPPED = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(MODEL_PATH, local_files_only=True))


def ids_of(text: str) -> list[int]:
    return cast(list[int], SHIPPED(text)["input_ids"])


def rendered(messages: list[dict[str, Any]], prompt: bool) -> str:
    return cast(str, SHIPPED.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def test_the_vocabulary_is_the_bytes_and_the_specials() -> None:
    assert SHIPPED.get_vocab() == VOCABULARY
    assert sorted(VOCABULARY.values()) == list(range(256 + len(SPECIAL)))
    assert (SHIPPED.eos_token_id, SHIPPED.pad_token_id) == (END_ID, PAD_ID)


@pytest.mark.parametrize("character", PRINTABLE)
def test_a_printable_character_is_one_token_and_decodes_to_itself(character: str) -> None:
    (token,) = ids_of(character)
    assert SHIPPED.decode([token]) == character


def test_all_printable_characters_together_decode_to_themselves() -> None:
    assert SHIPPED.decode(ids_of(PRINTABLE)) == PRINTABLE
    assert len(ids_of(PRINTABLE)) == len(PRINTABLE) == 96


@given(st.text(alphabet=PRINTABLE))
def test_ascii_text_decodes_to_itself_including_spaces(text: str) -> None:
    assert SHIPPED.decode(ids_of(text)) == text


def test_text_beyond_ascii_decodes_to_itself() -> None:
    text = "6\u00d77 \u2260 41 \u2603\t\r\n"
    assert SHIPPED.decode(ids_of(text)) == text


def test_special_tokens_are_left_out_of_a_reply() -> None:
    assert SHIPPED.decode([*turn("assistant", "1 + 2"), PAD_ID], skip_special_tokens=True) == "1 + 2"


@given(st.text(alphabet=st.characters(codec="ascii", exclude_characters="|")))
def test_training_and_serving_encode_alike(text: str) -> None:
    assert ids_of(text) == turn("user", text)[1:-1]


def test_bytes_beyond_ascii_encode_alike() -> None:
    text = "".join(map(chr, range(128, 0x250))) + "\u2603\U0001d7d5"
    assert ids_of(text) == turn("user", text)[1:-1]


def test_a_conversation_renders() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "2"}]},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": " 4 \n"},
    ]
    expected = "<|system|>Be exact.<|im_end|><|user|>1+2<|im_end|><|assistant|>3<|im_end|><|user|> 4 \n<|im_end|>"
    assert rendered(messages, prompt=False) == expected
    assert rendered(messages, prompt=True) == expected + "<|assistant|>"


def test_the_template_gives_the_tokens_of_training() -> None:
    reply = {"role": "assistant", "content": "1+2=3\n\\boxed{3}"}
    messages = [{"role": "system", "content": "Go."}, USER, reply]
    trained = [token for message in messages for token in turn(message["role"], message["content"])]
    assert ids_of(rendered(messages, prompt=False)) == trained


def test_developer_messages_count_as_system() -> None:
    system: dict[str, Any] = {"role": "system", "content": "x"}
    developer: dict[str, Any] = {"role": "developer", "content": "x"}
    assert rendered([developer, USER], prompt=True) == rendered([system, USER], prompt=True)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
        {"role": "wizard", "content": "1+2"},
    ],
)
def test_messages_that_the_model_cannot_read_are_refused(message: dict[str, Any]) -> None:
    with pytest.raises(TemplateError, match="The demo model"):
        rendered([message], prompt=True)


def test_the_code_builds_the_shipped_files() -> None:
    assert SHIPPED.backend_tokenizer.to_str() == build_tokenizer().backend_tokenizer.to_str()
    assert SHIPPED.chat_template == CHAT_TEMPLATE
