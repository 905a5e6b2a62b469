"""Triton's interpreter for the kernels, unless tests are for a GPU; which process of pytest-xdist has which tests."""

import os

import pytest

if os.environ.get("EM_TEST_DEVICE", "cpu") == "cpu":  # benchmarks/gpu.sh asks for "cuda"
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep each test file in one process, for its fixtures, and all engine tests in the first: they share servers."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)  # stable; the engine's take longest
    for item in items:
        engine = item.get_closest_marker("engine") is not None
        item.add_marker(pytest.mark.xdist_group("engine" if engine else item.nodeid.partition("::")[0]))
