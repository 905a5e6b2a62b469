"""Python runs this in every process that has this folder on PYTHONPATH; it changes nothing unless a variable asks.

TRITON_INTERPRET=1: adds a Triton backend "cpu", so that the V2 model runner runs under Triton's interpreter.
EM_INF_HIDDEN=1: hides the plugin's entry points.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from types import SimpleNamespace

    from triton.backends import backends

    # vLLM's CPU build only asks whether the entry exists and is active; the interpreter needs no driver.
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def as_bool(mask):  # type: ignore[no-untyped-def]
        mask.data = mask.data.astype(bool)  # vLLM's speculation kernels pass int32, which the interpreter refuses
        return mask

    def masked_load(self, pointers, mask, *rest):  # type: ignore[no-untyped-def]
        return load(self, pointers, as_bool(mask), *rest)

    def masked_store(self, pointers, value, mask, *rest):  # type: ignore[no-untyped-def]
        return store(self, pointers, value, as_bool(mask), *rest)

    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store

if os.environ.get("EM_INF_HIDDEN") == "1":
    from harness.hidden_plugin import hide_plugin

    hide_plugin()
