"""A stub in the place of Triton's CUDA driver: Triton's own code binds, compiles and launches, without a GPU.

Needs a process without TRITON_INTERPRET=1. `environment` starts one, with any release of Triton that is here.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FETCHED = ROOT / ".venv" / "triton"  # scripts/test-triton.sh puts a folder for each release there
# Of PyTorch 2.11; of 2.13 (vLLM 0.31 and 0.32); of 2.14 (vLLM 0.33).
RELEASES = ("3.6.0", "3.7.1", "3.8.0")
SHARED_BYTES, THREADS = 101_376, 1024  # the most that every GPU since Ampere has for a program


@dataclass
class Launch:
    """One launch: a kernel's compiled code, its grid and its arguments, constants left out."""

    kernel: str
    ptx: str
    threads: int  # of a program, as are the bytes
    shared_bytes: int
    grid: tuple[int, int, int]
    arguments: list[Any]


@dataclass
class StubDriver:
    """What Triton asks of its driver. It notes each kernel that is loaded, once compiled, and each that is launched."""

    capability: int = 90
    execute: Callable[[Launch], None] | None = None  # None: a launch does nothing
    loaded: list[str] = field(default_factory=list)
    launched: list[str] = field(default_factory=list)

    def install(self) -> None:
        """Become Triton's driver for the rest of the process."""
        from triton.runtime import driver

        driver.set_active(self)

    @property
    def utils(self) -> "StubDriver":
        """Return the part of a driver that knows the device."""
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return what a compiled kernel is checked against."""
        return {"max_shared_mem": SHARED_BYTES}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Return (module, function, registers, spills, most threads)."""
        return 1, 1, 32, 0, THREADS

    def unload_module(self, module: int) -> None:
        """Do nothing."""

    def get_current_device(self) -> int:
        """Return a number for each capability: Triton keeps the kernels of devices apart."""
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> Any:
        """Return what to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def launcher_cls(self, source: Any, compiled: Any) -> Callable[..., None]:
        """Return what launches a kernel: Triton asks once, when it loads it. `compiled` is the kernel's metadata."""
        from triton.runtime.cache import get_cache_manager

        name, launched, execute = compiled.name, self.launched, self.execute
        self.loaded.append(name)
        if execute is None:
            return lambda *arguments: launched.append(name)
        ptx = Path(get_cache_manager(compiled.hash).get_file(f"{name}.ptx")).read_text()
        kinds = list(source.signature.values())

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            launched.append(name)
            # Before the kernel's arguments come the stream, the function, two kinds of metadata and two hooks.
            arguments = [value for value, kind in zip(rest[6:], kinds, strict=True) if kind != "constexpr"]
            execute(Launch(name, ptx, compiled.num_warps * 32, compiled.shared, (x, y, z), arguments))

        return launch


def installed_release() -> str:
    """Return the release of Triton in this environment."""
    return metadata.version("triton")


def is_here(release: str) -> bool:
    """Return whether this release of Triton is installed or fetched."""
    return release == installed_release() or (FETCHED / release / "triton").is_dir()


def environment(release: str) -> dict[str, str]:
    """Return the variables of a process in which this release of Triton compiles its kernels."""
    path = [str(ROOT)] if release == installed_release() else [str(FETCHED / release), str(ROOT)]
    cache = ROOT / "build" / "triton"
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}


if __name__ == "__main__":  # for scripts/test-triton.sh
    print(*(release for release in RELEASES if not is_here(release)))
