"""em-serve's flags: their defaults, their errors, and what would bypass this server."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from em_sampler.params import parse_params
from server import cli
from server.protocol import Settings


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="em-serve")
    cli._add_em_inf_flags(parser)
    cli._add_strategy_flags(parser)
    args = parser.parse_args(argv)
    cli._check_args(parser, args)
    return args


def test_flags_have_the_defaults_of_the_settings() -> None:
    assert Settings.from_args(parse()) == Settings()


def test_flags_reach_the_settings() -> None:
    settings = Settings.from_args(
        parse(
            *("--em-inf-default", '{"steps": 3}', "--em-inf-max-steps", "8"),
            *(
                "--strategy-max-branches",
                "2",
                "--strategy-max-in-flight",
                "9",
                "--strategy-refinement-prompt",
                "Again.",
            ),
        )
    )
    assert settings == Settings(parse_params({"steps": 3}), 8, 2, 9, "Again.")
    assert parse("--em-inf-default", "true").em_inf_default == parse_params(True)
    assert parse("--em-inf-default", "false").em_inf_default is None


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--em-inf-default", "{threshold"], "argument --em-inf-default: "),
        (["--em-inf-default", '{"threshold": 21}'], "got 21; must be a number from 0 up to 20"),
        (["--em-inf-default", '{"steps": 9}', "--em-inf-max-steps", "8"], "got 9; this server allows"),
        (["--em-inf-max-steps", "65"], "argument --em-inf-max-steps: "),
        (["--em-inf-statistics-address", "nowhere"], "argument --em-inf-statistics-address: "),
        (["--em-inf-statistics-address", "here:8600"], "set EM_INF_STATISTICS_KEY to the same 32 or more random"),
        (["--strategy-max-branches", "1"], "got '1'; must be an integer from 2 up"),
        (["--strategy-max-in-flight", "x"], "got 'x'; must be an integer from 1 up"),
        (["--strategy-max-branches", "9", "--strategy-max-in-flight", "8"], "above --strategy-max-in-flight"),
    ],
)
def test_a_wrong_flag_ends_with_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("variable", "argv", "says"),
    [
        ("1", [], "unset it"),
        ("True", [], "unset it"),
        ("0", ["--logits-processors", "em_sampler.vllm_plugin.processor:EMInfLogitsProcessor"], "drop it"),
    ],
)
def test_what_would_bypass_the_plugin_is_rejected(
    variable: str, argv: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", variable)
    monkeypatch.setattr(sys, "argv", ["em-serve", *argv])
    with pytest.raises(RuntimeError, match=says):
        cli._reject_bypasses()


def test_all_plugins_are_loaded_unless_the_user_names_some(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(group: str) -> list[Any]:
        return [argparse.Namespace(name="lora")] if group == "vllm.general_plugins" else []

    monkeypatch.setattr(cli.metadata, "entry_points", entry_points)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert cli._plugins_to_load() == ["em_inf", "lora"]
    monkeypatch.setenv("VLLM_PLUGINS", "other,")
    assert cli._plugins_to_load() == ["other", "em_inf"]
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert cli._plugins_to_load() == ["em_inf"]


def keyed(*argv: str) -> argparse.Namespace:
    """Parse the flags of the keys, with those of vLLM that they go with."""
    parser = argparse.ArgumentParser(prog="em-serve")
    parser.add_argument("--api-key", nargs="*")
    parser.add_argument("--middleware", action="append", default=["theirs"])
    cli._add_access_flags(parser)
    args = parser.parse_args(argv)
    cli._guard_with_keys(parser, args)
    return args


def test_the_keys_are_checked_before_all_routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    (tmp_path / "keys").write_text("one\n")
    for argv in ([], ["--api-key", "a", "b"], ["--api-key-file", str(tmp_path / "keys")]):
        assert keyed(*argv).middleware == ["theirs", "server.auth.KeyGuard"]
    module, name = cli.auth.MIDDLEWARE.rsplit(".", 1)
    assert getattr(importlib.import_module(module), name) is cli.auth.KeyGuard


def test_a_repeated_key_adds_to_the_others() -> None:
    assert keyed("--api-key", "a", "--api-key", "b", "c").api_key == ["a", "b", "c"]
    assert keyed().api_key is None


@pytest.mark.parametrize(
    ("variable", "argv", "says"),
    [
        ("", ["--api-key-file", "missing"], "missing cannot be read"),
        ("", ["--api-key-file", "keys", "--api-key", "a"], "not together with --api-key"),
        ("a", ["--api-key-file", "keys"], "not together with --api-key or VLLM_API_KEY"),
    ],
)
def test_keys_that_cannot_be_used_end_with_one_line(
    variable: str,
    argv: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text("one\n")
    monkeypatch.setenv("VLLM_API_KEY", variable)
    with pytest.raises(SystemExit) as caught:
        keyed(*argv)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
