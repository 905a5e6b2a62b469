"""Prompts from files and datasets; an error names the line."""

import json
from pathlib import Path

import pytest

from em_train.prompts import InputError, read_prompts


def test_a_jsonl_file_gives_its_distinct_prompts_in_order(tmp_path: Path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u\u2028"}]
    rows = [{"prompt": "b", "answer": 3}, {"prompt": chat}, {"prompt": "b"}, {"prompt": "a"}]
    path = tmp_path / "p.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    found = read_prompts(str(path))
    assert [prompt.content for prompt in found] == ["b", chat, "a"]
    assert [prompt.answer for prompt in found] == ["3", None, None]
    assert found[0].messages == [{"role": "user", "content": "b"}]
    assert [p.content for p in read_prompts(str(path), limit=2)] == ["b", chat]


def test_a_dataset_folder_is_found(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    [prompt] = read_prompts(str(tmp_path), column="question")
    assert (prompt.content, prompt.answer) == ("1+1", "2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "line 2: is no JSON"),
        ('{"prompt": "a"}\n[1]', "line 2: got [1]; must be a JSON object"),
        ('{"text": "a"}', "line 1: has no field 'prompt'; has text"),
        ('{"prompt": 7}', "line 1: prompt: got 7; must be text or a list of chat turns"),
        ('{"prompt": " "}', "line 1: prompt: got ' '"),
        ('{"prompt": []}', "line 1: prompt: got []"),
        ('{"prompt": [{"role": "user"}]}', "line 1: prompt: got {'role': 'user'}; a turn must be"),
        ("", "has no rows"),
        ("\udcff", "codec can't decode"),
    ],
)
def test_the_error_of_a_malformed_row_names_its_place(text: str, expected: str, tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError) as caught:
        read_prompts(str(path))
    assert str(path) in str(caught.value) and expected in str(caught.value)


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="--prompts: 'nowhere/at-all' is no file, and no dataset that loads"):
        read_prompts("nowhere/at-all")
