"""What is known of a model before vLLM loads it: a folder's files, a hub's answers and its absence."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from server import model_files
from server.model_files import ModelFiles, StartError, read_model

CONFIG = {"max_position_embeddings": 32_768, "dtype": "bfloat16"}


def folder_of(path: Path, config: object = CONFIG) -> str:
    (path / "config.json").write_text(json.dumps(config))
    for part, size in (("1", 1000), ("2", 500)):
        (path / f"model-{part}.safetensors").write_bytes(bytes(size))
    return str(path)


def test_a_folder_has_its_config_and_the_size_of_its_weights(tmp_path: Path) -> None:
    found = read_model(folder_of(tmp_path))
    assert (found.context, found.dtype, found.weights) == (32_768, "bfloat16", 1500)


@pytest.mark.parametrize(
    ("config", "context", "dtype"),
    [
        ({"torch_dtype": "float16"}, None, "float16"),
        ({"text_config": {"max_position_embeddings": 8, "dtype": "bfloat16"}}, 8, "bfloat16"),
        ({"max_position_embeddings": "many"}, None, None),
        ({"text_config": "none", "dtype": ["bfloat16"], "torch_dtype": "float32"}, None, "float32"),
        (CONFIG | {"quantization_config": {"bits": 4}}, 32_768, None),
    ],
)
def test_a_config_may_have_other_forms(config: dict[str, Any], context: int | None, dtype: str | None) -> None:
    files = ModelFiles(config)
    assert (files.context, files.dtype) == (context, dtype)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"^model: got '\./nothere'; there is no such folder"):
        read_model("./nothere")
    with pytest.raises(StartError, match=r"; the folder has no config\.json$"):
        read_model(str(tmp_path))
    folder_of(tmp_path, [])
    with pytest.raises(StartError, match="must hold a JSON object"):
        read_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(StartError, match="is no JSON"):
        read_model(str(tmp_path))


def test_what_is_no_hugging_face_folder_is_left_to_vllm(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    assert read_model(str(tmp_path)) == read_model("s3://bucket/model") == ModelFiles()
    assert read_model(str(tmp_path / "params.json")) == ModelFiles()  # a file, as a GGUF model is


# ---- A hub


class Hub(BaseHTTPRequestHandler):
    """A hub on this machine with one model, `some/model`; of any other it says what its name says."""

    def do_GET(self) -> None:
        """Answer for config.json, or list the files."""
        if "some/model" not in self.path:
            code = "GatedRepo" if "gated" in self.path else "RepoNotFound"
            return self._answer(403 if "gated" in self.path else 401, {}, {"X-Error-Code": code})
        if self.path.startswith("/api/models/some/model-without-list"):
            return self._answer(500, {}, {})
        if self.path.startswith("/api/"):
            files = [{"rfilename": "model.safetensors", "size": 7000}, {"rfilename": "README.md", "size": 5}]
            return self._answer(200, {"id": "some/model", "siblings": files}, {})
        return self._answer(200, CONFIG, {"ETag": '"1"', "X-Repo-Commit": "0" * 40})

    def do_HEAD(self) -> None:
        """Answer the same without a body."""
        self.do_GET()

    def _answer(self, status: int, body: object, headers: dict[str, str]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *message: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Serve a hub, and point huggingface_hub to it, with an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    point_to(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path)
    yield
    server.shutdown()
    server.server_close()


def point_to(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    def download(name: str, file: str, **options: Any) -> str:
        return str(hf_hub_download(name, file, endpoint=endpoint, cache_dir=cache, **options))

    hf_hub_download, api = model_files.hf_hub_download, model_files.HfApi
    monkeypatch.setattr(model_files, "hf_hub_download", download)
    monkeypatch.setattr(model_files, "HfApi", lambda: api(endpoint=endpoint))


def test_of_a_hub_the_config_alone_is_downloaded(hub: None) -> None:
    found = read_model("some/model")
    assert (found.context, found.dtype, found.weights) == (32_768, "bfloat16", 7000)


def test_weights_are_of_unknown_size_if_the_hub_does_not_list_them(hub: None) -> None:
    found = read_model("some/model-without-list")
    assert (found.context, found.weights) == (32_768, None)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("some/unknown", "the hub has no 'some/unknown', or it is private"),
        ("some/gated", "'some/gated' is gated"),
        ("a/b/c", "is neither a folder nor a name on the Hugging Face hub"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_named(hub: None, name: str, problem: str) -> None:
    with pytest.raises(StartError, match=problem):
        read_model(name)


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries again for half a minute
    with pytest.raises(StartError, match=r"^model: got 'some/model'; is no folder here; the hub cannot be reached"):
        read_model("some/model")
