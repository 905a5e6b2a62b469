"""The demo model's tokenizer and chat template: one token for each byte of UTF-8.

Every text has tokens, and decoding restores it. Training encodes with `turn`, which gives the same ids.
"""

from typing import Final

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

PAD: Final = "<|endoftext|>"
END: Final = "<|im_end|>"
ROLES: Final = ("system", "user", "assistant")
SPECIAL: Final = (PAD, END, *(f"<|{role}|>" for role in ROLES))
# ByteLevel's alphabet: a printable character stands for each of the 256 bytes (a space is written as U+0120).
VOCABULARY: Final = {token: index for index, token in enumerate((*SPECIAL, *sorted(ByteLevel.alphabet())))}
PAD_ID: Final = VOCABULARY[PAD]
END_ID: Final = VOCABULARY[END]
CONTEXT_LENGTH: Final = 1024

# One token opens each turn and one closes it: a model of 1.6 million parameters should not have to learn long headers.
CHAT_TEMPLATE: Final = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'developer', 'user', 'assistant'] -%}
{{- raise_exception('The demo model knows the roles system, user and assistant.') -}}
{%- endif -%}
{{- '<|' ~ (message['role'] | replace('developer', 'system')) ~ '|>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] or [] -%}
{%- if part['type'] != 'text' -%}
{{- raise_exception('The demo model reads text only.') -}}
{%- endif -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def build_tokenizer() -> Qwen2Tokenizer:
    """Return the tokenizer that ships: byte-level BPE without merges.

    It must be a Qwen2Tokenizer: for the model type `qwen2`, AutoTokenizer in transformers 5 ignores the class that the
    folder names and builds Qwen2Tokenizer from its vocabulary (models/auto/tokenization_auto.py).
    """
    tokenizer = Qwen2Tokenizer(
        vocab=VOCABULARY,
        merges=[],
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def turn(role: str, text: str) -> list[int]:
    """Return the token ids of one turn, including its opening and closing tokens."""
    return [VOCABULARY[f"<|{role}|>"], *(_BYTE_IDS[byte] for byte in text.encode()), END_ID]


def _byte_ids() -> list[int]:
    """Return the token id of each byte value: printable bytes keep their character, the others count up from U+0100."""
    ids, moved = [], 0x100
    for byte in range(256):
        prints = 0x21 <= byte <= 0x7E or (0xA1 <= byte <= 0xFF and byte != 0xAD)
        ids.append(VOCABULARY[chr(byte if prints else moved)])
        moved += not prints
    return ids


_BYTE_IDS: Final = _byte_ids()
