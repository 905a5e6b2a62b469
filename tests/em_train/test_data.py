"""What the steps train on: the order of prompts, and outputs from a file."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from em_train import data as module
from em_train.data import shuffled_order
from tests.em_train.support import SMALL, curve, ft, train


def test_every_prompt_comes_once_before_any_comes_twice():
    order = shuffled_order(5, 12, seed=1)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order[:5] != order[5:10] and len(order) == 12
    assert order == shuffled_order(5, 12, seed=1) != shuffled_order(5, 12, seed=2)


def test_the_dataset_has_the_files_outputs_up_to_the_longest_length(data: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(SMALL["model"])
    full, short = (
        module.ft_dataset(settings, tokenizer, len(tokenizer), *module.read(settings))
        for settings in (ft(outputs=data, out=tmp_path), ft(outputs=data, out=tmp_path, max_tokens=4))
    )
    assert len(full) == SMALL["steps"] * SMALL["batch_size"]
    assert {row["output_ids"][-1] for row in full} == {tokenizer.eos_token_id}
    assert min(len(row["output_ids"]) for row in full) > 4
    assert short == [row | {"output_ids": row["output_ids"][:4]} for row in full]


@pytest.mark.slow
def test_outputs_from_a_file_are_cut_at_the_longest_length(data: Path, tmp_path: Path):
    short = train(ft(outputs=data, out=tmp_path / "short", max_tokens=4))
    full = train(ft(outputs=data, out=tmp_path / "full"))
    assert curve(short, "loss")[0] != pytest.approx(curve(full, "loss")[0], rel=0.01)
