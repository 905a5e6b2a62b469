"""Outputs sampled in this process; tests/engine/test_training.py samples from a server."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import demo
from em_train.prompts import InputError
from em_train.sample import sample
from em_train.settings import SampleSettings, validate
from harness.ports import free_port
from tests.em_train.support import ft, train, write_prompts


def settings(prompts: Path, out: Path, **more: Any) -> SampleSettings:
    given = {"model": str(demo.MODEL_PATH), "prompts": str(prompts), "out": out, "max_tokens": 96, "concurrency": 4}
    return validate(SampleSettings, given | more)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", 6)


def test_every_prompt_gets_its_outputs_with_entropies_and_ft_trains_on_them(prompts: Path, tmp_path: Path):
    out = tmp_path / "deep" / "outputs.jsonl"
    assert sample(settings(prompts, out, samples=2)) == "12 outputs to 6 prompts were written, 0 were there"
    found = rows(out)
    questions = rows(prompts)
    assert [(row["prompt"], row["sample"]) for row in found] == [(p["prompt"], i) for p in questions for i in (0, 1)]
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    for row in found:
        assert row["tokens"] == len(row["token_ids"])
        assert row["output"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert row["finish_reason"] == "stop" and row["token_ids"][-1] == tokenizer.eos_token_id
        assert 0 < row["entropy"] < 1
    assert len({row["output"] for row in found}) > 6, "the samples of a prompt have different seeds"
    loss = train(ft(outputs=out, out=tmp_path / "o", batch_size=12, max_tokens=96))["log"][1]["loss"]
    mean = sum(row["entropy"] * row["tokens"] for row in found) / sum(row["tokens"] for row in found)
    assert loss == pytest.approx(mean, rel=1e-3)


def test_outputs_in_the_file_are_not_sampled_again_and_an_incomplete_line_is_dropped(prompts: Path, tmp_path: Path):
    out = tmp_path / "outputs.jsonl"
    sample(settings(prompts, out))
    complete = out.read_text()
    lines = complete.splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:20])
    assert sample(settings(prompts, out)) == "3 outputs to 6 prompts were written, 3 were there"
    assert out.read_text().startswith("".join(lines[:3]))
    assert [row["prompt"] for row in rows(out)] == [json.loads(line)["prompt"] for line in lines]
    assert sample(settings(prompts, out)) == "0 outputs to 6 prompts were written, 6 were there"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"temperature": 0.5}, r"--temperature: got 0\.5; the outputs in .* are by 1\.0"),
        ({"model": "other"}, "--model: got 'other'; the outputs in"),
    ],
)
def test_outputs_of_other_settings_are_not_mixed(more: dict[str, Any], expected: str, prompts: Path, tmp_path: Path):
    out = tmp_path / "outputs.jsonl"
    row = {"prompt": "1", "sample": 0, "model": str(demo.MODEL_PATH), "temperature": 1.0}
    out.write_text(json.dumps(row) + "\n")
    before = out.read_text()
    with pytest.raises(InputError, match=expected):
        sample(settings(prompts, out, **more))
    assert out.read_text() == before


def test_a_file_with_other_content_is_not_appended_to(prompts: Path):
    with pytest.raises(InputError, match="line 1: has no 'sample'; is no file of em-train sample"):
        sample(settings(prompts, prompts))


def test_a_server_that_does_not_answer_is_an_input_error(prompts: Path, tmp_path: Path):
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(InputError, match=f"--base-url: got '{url}'; nothing answers there"):
        sample(settings(prompts, tmp_path / "o.jsonl", base_url=url))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_an_oserror(prompts: Path):
    with pytest.raises(OSError, match="No space left"):
        sample(settings(prompts, Path("/dev/full")))
