"""Keeps the objects of other tests out of the garbage collections that every load makes (loadtest/load.py).

Before each load, `gc.collect` scans every object of the process. Once other tests have imported torch and vLLM that is
slow, and the many short loads of these tests would spend most of their time in it. So all objects that exist at the
start are frozen: the collector ignores them. They must stay frozen, but `run_load` calls `gc.unfreeze` after its load,
which is therefore disabled.
"""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def frozen_objects() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
    gc.unfreeze()
