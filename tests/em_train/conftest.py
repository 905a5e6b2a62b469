"""Prompts and outputs to train on."""

from pathlib import Path

import pytest

from tests.em_train.support import write_outputs, write_prompts


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", 32)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with as many outputs as a step takes."""
    return write_outputs(tmp_path_factory.mktemp("data") / "outputs.jsonl", 8)
