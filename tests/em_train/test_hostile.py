"""Files, folders and settings that em-train did not write: a result, or an `InputError` that names the place."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoTokenizer

import demo
from em_train import checkpoints, data
from em_train.cli import main
from em_train.fingerprint import fingerprint_of
from em_train.model import load
from em_train.outputs import encode
from em_train.prompts import InputError, Prompt, read_prompts
from em_train.run_report import check_same_settings
from em_train.sample import sample
from em_train.settings import SampleSettings, validate
from tests.em_train.support import SMALL, ft, rl

TOKENIZER = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
SIZE = len(TOKENIZER)
CHAT = [{"role": "user", "content": "3+4"}]
bounded = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TURNS = st.lists(JSON | st.fixed_dictionaries({"role": JSON, "content": JSON}), max_size=2)
FIELDS = {
    "prompt": st.just("3+4") | JSON | TURNS,
    "output": st.just("7") | JSON,
    "sample": JSON,
    "model": JSON,
    "temperature": JSON,
    "answer": JSON,
    "finish_reason": st.just("stop") | JSON,
    "token_ids": st.lists(st.integers(-1, SIZE) | JSON, max_size=3) | JSON,
    "tokenizer": JSON,
}
LINE = (st.fixed_dictionaries({}, optional=FIELDS) | JSON).map(lambda row: json.dumps(row).encode()) | st.binary()
FILE = st.lists(LINE, max_size=3).map(b"\n".join)


def attempt(call: Any) -> Any:
    """Return what the call returns, None if it raises InputError; all other errors fail the test."""
    try:
        return call()
    except InputError as error:
        if not str(error):
            raise
        return None


@bounded
@given(content=FILE)
def test_any_file_of_prompts(content: bytes, tmp_path: Path):
    (tmp_path / "p.jsonl").write_bytes(content)
    for prompt in attempt(lambda: read_prompts(str(tmp_path / "p.jsonl"))) or ():
        assert prompt.key and prompt.messages
        attempt(lambda prompt=prompt: encode(TOKENIZER, prompt))


@bounded
@given(content=FILE)
def test_any_file_of_outputs(content: bytes, tmp_path: Path):
    path = tmp_path / "o.jsonl"
    path.write_bytes(content)
    wanted = ft(outputs=path, out=tmp_path)
    dataset = attempt(lambda: data.ft_dataset(wanted, TOKENIZER, SIZE, *data.read(wanted)))
    for row in dataset or ():
        assert row["output_ids"] and all(0 <= i < SIZE for i in row["output_ids"])


@bounded
@given(content=FILE)
def test_any_file_that_sampling_would_go_on_with(content: bytes, tmp_path: Path):
    out, prompts = tmp_path / "out.jsonl", tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "3+4"}\n')
    out.write_bytes(b'{"prompt": "3+4", "sample": 0, "model": "m", "temperature": 1.0}\n' + content)
    given = {"model": "m", "prompts": str(prompts), "out": out}
    attempt(lambda: sample(validate(SampleSettings, given)))


@bounded
@given(report=st.binary() | JSON.map(lambda x: json.dumps({"settings": x}).encode()))
def test_any_report_of_a_run_to_resume(report: bytes, tmp_path: Path):
    (tmp_path / "run.json").write_bytes(report)
    with pytest.raises(InputError, match="--"):
        check_same_settings(ft(fresh_every=1, prompts="p", out=tmp_path))


@bounded
@given(state=st.binary() | JSON.map(lambda x: json.dumps(x).encode()), name=st.text("0123456789-a", max_size=22))
def test_any_checkpoint_is_incomplete_and_removed(state: bytes, name: str, tmp_path: Path):
    wanted = ft(fresh_every=1, prompts="p", out=tmp_path, resume=True)
    (tmp_path / "run.json").write_text(json.dumps({"settings": wanted.model_dump(mode="json")}))
    folder = tmp_path / "checkpoints" / f"checkpoint-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_bytes(state)
    assert checkpoints.prepare_folder(wanted) is None
    shutil.rmtree(tmp_path / "checkpoints")


@pytest.mark.parametrize("damaged", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_with_a_damaged_file_gives_way_to_the_one_before(damaged: str, tmp_path: Path):
    wanted = ft(fresh_every=1, prompts="p", out=tmp_path, resume=True)
    (tmp_path / "run.json").write_text(json.dumps({"settings": wanted.model_dump(mode="json")}))
    for step in (9, 10):
        folder = tmp_path / f"checkpoints/checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(
            json.dumps({"global_step": step, "log_history": [{"eval_entropy": 1}]})
        )
        save_file({"weight": torch.zeros(4)}, folder / "model.safetensors")
        for name in ("optimizer.pt", "rng_state.pth"):
            torch.save({}, folder / name)
    assert checkpoints.prepare_folder(wanted) == folder
    (folder / damaged).write_bytes((folder / damaged).read_bytes()[:-1])
    assert checkpoints.prepare_folder(wanted) == folder.with_name("checkpoint-9") and not folder.exists()


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"token_ids": [5, SIZE]}, f"line 1: token_ids: got {SIZE}; must be from 0 to {SIZE - 1}"),
        ({"token_ids": [5, -1]}, "line 1: token_ids: got -1; must be from 0"),
        ({"token_ids": "5"}, "line 1: token_ids: got '5'; must be a list of whole numbers"),
        ({"token_ids": [True]}, "line 1: token_ids: got [True]"),
        (
            {"token_ids": [5], "tokenizer": "0" * 16},
            "line 1: token_ids: are of the tokenizer 0000000000000000; --model",
        ),
        ({"output": ""}, "line 1: output: got ''; must have a token"),
        ({"output": "\ud800"}, "line 1: is no JSON: 'utf-8' codec"),
        ({"prompt": 7}, "line 1: prompt: got 7; must be text"),
    ],
)
def test_foreign_outputs_are_named(row: dict[str, Any], problem: str, tmp_path: Path):
    path = tmp_path / "o.jsonl"
    path.write_text(json.dumps({"prompt": "3+4", "output": "7"} | row) + "\n")
    wanted = ft(outputs=path, out=tmp_path)
    with pytest.raises(InputError) as caught:
        data.ft_dataset(wanted, TOKENIZER, SIZE, *data.read(wanted))
    assert str(caught.value).startswith(f"{path}: {problem}")


@pytest.mark.parametrize("tokenizer", [{}, {"tokenizer": fingerprint_of(TOKENIZER)}])
def test_token_ids_of_this_tokenizer_or_of_an_older_file_are_trained_on(tokenizer: dict[str, str], tmp_path: Path):
    path = tmp_path / "o.jsonl"
    path.write_text(json.dumps({"prompt": "3+4", "output": "7", "token_ids": [5, 6]} | tokenizer) + "\n")
    wanted = ft(outputs=path, out=tmp_path)
    dataset = data.ft_dataset(wanted, TOKENIZER, SIZE, *data.read(wanted))
    assert all(row["output_ids"] == [5, 6] for row in dataset)


def test_a_tokenizer_with_other_ids_has_another_fingerprint():
    other = json.loads(TOKENIZER.backend_tokenizer.to_str())
    vocabulary = other["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    swapped = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    swapped._tokenizer = type(swapped.backend_tokenizer).from_str(json.dumps(other))
    assert fingerprint_of(swapped) != fingerprint_of(TOKENIZER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    return Path(shutil.copytree(demo.MODEL_PATH, tmp_path / "model"))


def without_template(folder: Path) -> str:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("command", ["sample", "ft", "rl"])
def test_chat_turns_without_a_chat_template_are_one_line(
    command: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": CHAT}) + "\n")
    flags = ["--model", without_template(folder), "--prompts", str(prompts), "--out", str(tmp_path / "o")]
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "model"]
    more = {"sample": ["--max-tokens=9"], "ft": [*small, "--fresh-every=1"], "rl": small}[command]
    assert main([command, *flags, *more]) == 2
    assert "em-train: --model: its tokenizer has no chat template, and a prompt is chat turns" in capfd.readouterr().err


def test_a_chat_template_that_refuses_is_quoted(folder: Path):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system turns') }}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(InputError, match=r"--model: its chat template refuses .*: no system turns"):
        encode(tokenizer, Prompt("3+4"))


@pytest.mark.parametrize("kind", [ft, rl])
def test_a_reporter_that_is_not_installed_is_one_line(kind: Any, tmp_path: Path):
    from em_train.run import run

    given = {"fresh_every": 1} if kind is ft else {}
    with pytest.raises(InputError, match=r"--report-to: got 'wandb'; it is not installed.*pip install wandb"):
        run(kind(prompts="p", out=tmp_path / "o", report_to="wandb", **given))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"\xff", b"{}"])
def test_a_folder_with_a_foreign_file_is_a_model_or_an_input_error(name: str, content: bytes, folder: Path):
    (folder / name).write_bytes(content)
    loaded = attempt(lambda: load(ft(model=str(folder), fresh_every=1, prompts="p", out="o")))
    assert loaded is None or loaded[1].generation_config is not None


def test_a_proxy_without_its_package_is_an_input_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert attempt(lambda: load(ft(model="nobody/nothing", fresh_every=1, prompts="p", out="o"))) is None
    assert attempt(lambda: read_prompts("nobody/nothing")) is None
