"""The card of a run, beside the weights: what was asked, on which data, the curves, and why it ended."""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from em_train.data import Rows
from em_train.prompts import InputError, Prompt
from em_train.settings import TrainSettings

JSON, PAGE = "run.json", "run.md"
PACKAGES = ("em-inf-server", "torch", "transformers", "trl", "peft", "accelerate")
CURVES = ("step", "entropy", "length", "repetition", "score", "keep")  # of the checks; train curves are in the JSON


class Card:
    """Written when a run begins, so that one that is killed has it too, and again when it ends."""

    def __init__(
        self,
        settings: TrainSettings,
        prompts: Sequence[Prompt],
        rows: Rows,
        trainer: Any,
    ) -> None:
        self._trainer = trainer
        keys = [prompt.key for prompt in prompts] + [row["output"] for _, row in rows]
        self._about = {
            "command": _command(settings),
            "settings": _compared(settings),
            "data": {
                "prompts": len(prompts),
                "outputs": len(rows),
                "sha256": hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
            },
            "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "processes": trainer.args.world_size,
        }

    @property
    def ended(self) -> str:
        """Why the training ended, in words."""
        trainer, state = self._trainer, self._trainer.state
        told = f"all {state.global_step} steps were taken"
        if trainer.stopped:
            told = f"stopped at step {state.global_step}: {trainer.stopped}"
        untrained = trainer.checks()[0].score or 0.0
        return told + ("; the untrained model was better" if state.best_metric < untrained else "")

    def write(self, out: Path, ended: bool = False) -> None:
        """Both files, whole or not at all."""
        state = self._trainer.state
        kept = state.best_global_step if ended else None
        result = {"ended": self.ended if ended else None, "kept_step": kept, "log": state.log_history}
        _replace(out / JSON, json.dumps(self._about | result, indent=1) + "\n")
        _replace(out / PAGE, self._page(kept, state.log_history, ended))

    def _page(self, kept: int | None, log: Sequence[dict[str, Any]], ended: bool) -> str:
        about = self._about
        result = "It has not ended, or was killed."
        if ended:
            result = f"{self.ended[0].upper() + self.ended[1:]}. Kept: the weights of step {kept}."
        settings = "\n".join(f"| {name} | {value} |" for name, value in about["settings"].items())
        checks = [row for row in log if "eval_entropy" in row]
        curve = "\n".join("| " + " | ".join(_cell(row, name) for name in CURVES) + " |" for row in checks)
        data, versions = about["data"], ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        return f"""# A run of em-train {about["command"]}

{result}

{data["prompts"]} prompts, {data["outputs"]} outputs from a file (sha256 {data["sha256"][:16]}).
{versions}; processes: {about["processes"]}.

| {" | ".join(CURVES)} |
|{"---|" * len(CURVES)}
{curve}

Entropy in nats a token, length in tokens, at each check; step 0 is the model as it came. The losses are in {JSON}.

| setting | value |
|---|---|
{settings}
"""


def check_same(settings: TrainSettings) -> None:
    """Refuse to go on with a run under other settings.

    Raises:
        InputError: there is no run, or one with other settings; names them.
    """
    try:
        begun = json.loads((settings.out / JSON).read_text())["settings"]
    except (OSError, ValueError, KeyError):
        raise InputError(f"--resume: {settings.out} holds no run to go on with") from None
    now = _compared(settings)
    if other := [name for name in now if now[name] != begun.get(name)]:
        flag = "--" + other[0].replace("_", "-")
        raise InputError(f"{flag}: got {now[other[0]]!r}; the run in {settings.out} has {begun.get(other[0])!r}")


def _compared(settings: TrainSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude={"resume", "out", "report_to"})


def _command(settings: TrainSettings) -> str:
    return type(settings).__name__.removesuffix("Settings").lower()


def _cell(row: dict[str, Any], name: str) -> str:
    value = row.get(name if name == "step" else f"eval_{name}")
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
