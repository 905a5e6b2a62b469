"""The report beside a run's weights, run.json and run.md: settings, data, curves, and why the training ended."""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from em_train.data import Sampled
from em_train.prompts import InputError, Prompt
from em_train.settings import TrainSettings

JSON_NAME, PAGE_NAME = "run.json", "run.md"
PACKAGES = ("em-inf-server", "torch", "transformers", "trl", "peft", "accelerate")
CURVES = ("step", "entropy", "length", "repetition", "score", "keep")  # of the evaluations; losses are in the JSON


class RunReport:
    """The report of one run. Written when the run begins, so that a killed run has one too, and again when it ends."""

    def __init__(
        self, settings: TrainSettings, prompts: Sequence[Prompt], rows: Sequence[Sampled], trainer: Any
    ) -> None:
        self._trainer = trainer
        keys = [prompt.key for prompt in prompts] + [row.output for row in rows]
        self._facts = {
            "command": type(settings).__name__.removesuffix("Settings").lower(),
            "settings": _comparable(settings),
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
        reason = f"all {state.global_step} steps were taken"
        if trainer.stop_reason:
            reason = f"stopped at step {state.global_step}: {trainer.stop_reason}"
        untrained_score = trainer.past_evaluations()[0].score or 0.0
        return reason + ("; the untrained model was better" if state.best_metric < untrained_score else "")

    def write(self, out: Path, ended: bool = False) -> None:
        """Write both files into the folder `out`, each completely or not at all."""
        state = self._trainer.state
        kept_step = state.best_global_step if ended else None
        result = {"ended": self.ended if ended else None, "kept_step": kept_step, "log": state.log_history}
        _write_atomically(out / JSON_NAME, json.dumps(self._facts | result, indent=1) + "\n")
        _write_atomically(out / PAGE_NAME, self._page(kept_step, state.log_history, ended))

    def _page(self, kept_step: int | None, log: Sequence[dict[str, Any]], ended: bool) -> str:
        facts = self._facts
        result = "Not ended yet, or killed."
        if ended:
            result = f"{self.ended[0].upper() + self.ended[1:]}. Kept: the weights of step {kept_step}."
        settings = "\n".join(f"| {name} | {value} |" for name, value in facts["settings"].items())
        evaluations = [row for row in log if "eval_entropy" in row]
        curve = "\n".join("| " + " | ".join(_cell(row, name) for name in CURVES) + " |" for row in evaluations)
        data, versions = facts["data"], ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        return f"""# A run of em-train {facts["command"]}

{result}

{data["prompts"]} prompts, {data["outputs"]} outputs from a file (sha256 {data["sha256"][:16]}).
{versions}; processes: {facts["processes"]}.

| {" | ".join(CURVES)} |
|{"---|" * len(CURVES)}
{curve}

One row for each evaluation; step 0 is the untrained model. Entropy in nats per token, length in tokens per output. The
losses are in {JSON_NAME}.

| setting | value |
|---|---|
{settings}
"""


def check_same_settings(settings: TrainSettings) -> None:
    """Check that the run in `settings.out` was begun with the same settings.

    Raises:
        InputError: if there is no run, or if a setting differs; names the first.
    """
    try:
        begun = dict(json.loads((settings.out / JSON_NAME).read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"--resume: {settings.out} holds no run to go on with") from None
    now = _comparable(settings)
    if different := [name for name in now if now[name] != begun.get(name)]:
        name = different[0]
        flag = "--" + name.replace("_", "-")
        raise InputError(f"{flag}: got {now[name]!r}; the run in {settings.out} has {begun.get(name)!r}")


def _comparable(settings: TrainSettings) -> dict[str, Any]:
    """Return the settings that must be the same to resume."""
    return settings.model_dump(mode="json", exclude={"resume", "out", "report_to"})


def _cell(row: dict[str, Any], name: str) -> str:
    value = row.get(name if name == "step" else f"eval_{name}")
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)


def _write_atomically(path: Path, text: str) -> None:
    """Write a temporary file beside `path` and rename it: a full disk or a crash leaves the old content of `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
