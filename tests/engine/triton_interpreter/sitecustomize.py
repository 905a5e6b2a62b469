"""Lets vLLM's V2 model runner run on a CPU: with this folder on PYTHONPATH and TRITON_INTERPRET=1, every process that
vLLM starts finds a Triton "cpu" backend, and Triton's kernels run under its interpreter."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from types import SimpleNamespace

    from triton.backends import backends

    # vLLM's CPU build only asks whether the entry exists and is active; the interpreter needs no driver.
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
