"""One thread for the small models of these tests (on a busy machine two wait for each other), and data."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.em_train.support import write_outputs, write_prompts


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", 32)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with as many outputs as a step takes."""
    return write_outputs(tmp_path_factory.mktemp("data") / "outputs.jsonl", 8)
