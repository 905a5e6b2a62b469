"""Keeps the objects of other tests out of the garbage collections that every load makes (loadtest/load.py).

Before each load, `gc.collect` scans every object of the process. Once other tests have imported torch and vLLM these
are millions, and a scan takes a second or more: the load tests' many short loads would spend most of their time in it.
So all objects that exist now are frozen, which means that the collector ignores them, and stay frozen:
`run_load` calls `gc.unfreeze` after a load, which would release them again.
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
