"""The range of supported vLLMs, and the refusal of every other in one line."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from em_sampler.vllm_plugin import version

PYPROJECT = Path(version.__file__).parent.parent / "pyproject.toml"


def test_the_cuda_extra_names_the_supported_range() -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    (cuda,) = map(Requirement, extras["cuda"])
    assert (cuda.name, set(cuda.specifier)) == ("vllm", set(version.SUPPORTED_VLLM))


@pytest.mark.parametrize("version", ["0.30.2", "0.34.0", "0.34.0rc1", "1.0.0", None])
def test_an_unsupported_vllm_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setattr(version, "installed_vllm", lambda: version)
    with pytest.raises(RuntimeError) as refusal:
        version.check_vllm_version()
    message = str(refusal.value)
    assert len(message.splitlines()) == 1
    assert str(version.SUPPORTED_VLLM) in message and f"found {version or 'none'}" in message


@pytest.mark.parametrize("version", ["0.31.0", "0.32.0", "0.33.1", "0.33.1rc2"])
def test_a_supported_vllm_is_accepted(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(version, "installed_vllm", lambda: version)
    version.check_vllm_version()
