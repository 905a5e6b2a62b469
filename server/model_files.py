"""What is known of a model before vLLM loads it: its config.json and the size of its weights, from a folder or a hub.

Knows nothing of vLLM. What is neither, such as a GGUF file or a bucket, is left to vLLM.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CONFIG = "config.json"
MISTRAL_CONFIG = "params.json"  # in place of config.json
WEIGHTS = ".safetensors"


class StartError(ValueError):
    """Arguments with which the server would not start, or would end at its first request; in one line."""


@dataclass(frozen=True)
class ModelFiles:
    """The configuration of a model; empty if it has none that we read."""

    config: dict[str, Any] = field(default_factory=dict)
    weights: int | None = None  # bytes of its safetensors files; None if unknown

    @property
    def context(self) -> int | None:
        """The most tokens of a prompt with its reply; None if the configuration does not say."""
        context = (self._text or self.config).get("max_position_embeddings")
        return context if isinstance(context, int) else None

    @property
    def dtype(self) -> str | None:
        """The type of the weights, such as bfloat16; None if it is unknown, or if they are quantized."""
        if "quantization_config" in self.config:
            return None
        names = (part.get(name) for part in (self.config, self._text) for name in ("dtype", "torch_dtype"))
        return next((name for name in names if isinstance(name, str)), None)

    @property
    def _text(self) -> dict[str, Any]:
        """The part of a multimodal model that writes; empty if there is none."""
        text = self.config.get("text_config")
        return text if isinstance(text, dict) else {}


def read_model(model: str, revision: str | None = None, token: str | bool | None = None) -> ModelFiles:
    """Read what is there of a model; of a hub it downloads config.json alone.

    Args:
        model: a folder, or a name on the hub.
        revision: a branch, tag or commit of the hub's.
        token: for the hub; None or True for the one that is saved.

    Raises:
        StartError: if there is no such model, or the hub cannot be reached and has not been asked before.
    """
    if "://" in model or Path(model).is_file():
        return ModelFiles()
    if Path(model).is_dir():
        return _read_folder(Path(model))
    if model.startswith((".", "/", "~")):
        raise StartError(f"model: got {model!r}; there is no such folder")
    if os.environ.get("VLLM_USE_MODELSCOPE", "0").lower() in ("1", "true"):
        return ModelFiles()
    return _read_hub(model, revision, token)


def _read_folder(folder: Path) -> ModelFiles:
    path = folder / CONFIG
    if not path.is_file():
        if (folder / MISTRAL_CONFIG).is_file() or any(folder.glob("*.gguf")):
            return ModelFiles()
        raise StartError(f"model: got {str(folder)!r}; the folder has no {CONFIG}")
    weights = sum(file.stat().st_size for file in folder.glob("*" + WEIGHTS))
    return ModelFiles(_parsed(path), weights or None)


def _read_hub(name: str, revision: str | None, token: str | bool | None) -> ModelFiles:
    try:
        path = Path(hf_hub_download(name, CONFIG, revision=revision, token=token))
    except HFValidationError:
        raise StartError(f"model: got {name!r}; is neither a folder nor a name on the Hugging Face hub") from None
    except GatedRepoError:
        raise StartError(f"model: {name!r} is gated: accept its terms on the hub, and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise StartError(f"model: the hub has no {name!r}, or it is private: then set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise StartError(f"--revision: got {revision!r}; the hub's {name!r} has no such revision") from None
    except LocalEntryNotFoundError:
        problem = "the hub cannot be reached, and the cache does not have it: give the folder of a model"
        raise StartError(f"model: got {name!r}; is no folder here; {problem}") from None
    except EntryNotFoundError:
        return ModelFiles()  # a repository in another format
    return ModelFiles(_parsed(path), _hub_weights(name, path, revision, token))


def _hub_weights(name: str, config: Path, revision: str | None, token: str | bool | None) -> int | None:
    """Return the bytes of the weights: in the cache if they are there, else as the hub lists them."""
    cached = sum(file.stat().st_size for file in config.parent.glob("*" + WEIGHTS))
    if cached:
        return cached
    try:
        files = HfApi().model_info(name, revision=revision, token=token, files_metadata=True).siblings or ()
    except Exception:  # also the errors of the HTTP library, which is another one in each release of the hub's client
        return None
    return sum(file.size or 0 for file in files if file.rfilename.endswith(WEIGHTS)) or None


def _parsed(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise StartError(f"model: {str(path)!r} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise StartError(f"model: {str(path)!r} must hold a JSON object")
    return config
