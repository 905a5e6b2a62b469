"""The range of supported vLLM releases, and the error for any other, in one line."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from em_sampler.vllm_plugin import version

PYPROJECT = Path(version.__file__).parents[2] / "pyproject.toml"


def test_the_cuda_extra_names_the_supported_range() -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    (cuda,) = (each for each in map(Requirement, extras["cuda"]) if each.name != "em-inf-server")
    assert (cuda.name, set(cuda.specifier)) == ("vllm", set(version.SUPPORTED_VLLM))


@pytest.mark.parametrize("installed", ["0.30.2", "0.34.0", "0.34.0rc1", "1.0.0", None])
def test_an_unsupported_vllm_is_rejected_in_one_line(monkeypatch: pytest.MonkeyPatch, installed: str | None) -> None:
    monkeypatch.setattr(version, "installed_vllm", lambda: installed)
    with pytest.raises(RuntimeError) as rejected:
        version.check_vllm_version()
    message = str(rejected.value)
    assert len(message.splitlines()) == 1
    assert str(version.SUPPORTED_VLLM) in message and f"found {installed or 'none'}" in message


@pytest.mark.parametrize("installed", ["0.31.0", "0.32.0", "0.33.1", "0.33.1rc2"])
def test_a_supported_vllm_is_accepted(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(version, "installed_vllm", lambda: installed)
    version.check_vllm_version()
