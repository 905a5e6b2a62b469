"""What `import em_sampler` offers, and that it needs nothing heavy before a transform is used."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import em_sampler
from em_sampler.transforms import batch, dispatch

WITHOUT_HEAVY_MODULES = """
import sys
for name in ("numba", "numpy", "torch", "transformers", "triton", "vllm", "zmq"):
    sys.modules[name] = None  # an import of it fails
import em_sampler.params
import em_sampler.validation
import em_sampler
print(em_sampler.EMInfParams(), em_sampler.params.parse_params({"method": "none"}))
try:
    em_sampler.transform
except ImportError as error:
    print("transform:", error.name)
"""


def test_params_need_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_HEAVY_MODULES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    params, transform = done.stdout.splitlines()
    assert "threshold=0.3" in params
    assert transform in ("transform: torch", "transform: numpy")  # the names are blocked


def test_the_public_names() -> None:
    assert em_sampler.transform is dispatch.transform
    assert em_sampler.TransformOutput is batch.TransformOutput
    for name in em_sampler.__all__:
        assert getattr(em_sampler, name).__name__ == name


def test_the_version_is_the_projects() -> None:
    pyproject = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())
    assert em_sampler.__version__ == pyproject["project"]["version"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'transformer'"):
        em_sampler.transformer  # noqa: B018
