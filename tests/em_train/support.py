"""The demo model's small runs, prompts and settings that the tests of em_train share."""

import json
from pathlib import Path
from typing import Any

import demo
from demo.problems import problems
from em_train.run import run
from em_train.settings import FtSettings, RlSettings, validate

SMALL = {
    "model": str(demo.MODEL_PATH),
    "max_tokens": 96,
    "steps": 2,
    "eval_every": 2,
    "eval_prompts": 4,
    "batch_size": 8,
    "micro_batch_size": 4,
    "learning_rate": 1e-4,
}


def write_prompts(path: Path, n: int, split: Any = "train") -> Path:
    rows = [{"prompt": p.question, "answer": str(p.answer)} for p in problems(split, n, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_outputs(path: Path, n: int) -> Path:
    """Write a file as `em-train sample` does, but without the token ids."""
    rows = [{"prompt": p.question, "output": p.solution, "finish_reason": "stop"} for p in problems("train", n, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ft(**given: Any) -> FtSettings:
    return validate(FtSettings, SMALL | given)


def rl(**given: Any) -> RlSettings:
    return validate(RlSettings, SMALL | given)


def train(settings: Any) -> dict[str, Any]:
    """Train, and return the run's report."""
    run(settings)
    report: dict[str, Any] = json.loads((settings.out / "run.json").read_text())
    return report


def curve(report: dict[str, Any], name: str) -> list[float]:
    return [row[name] for row in report["log"] if name in row]


def weights(out: Path) -> bytes:
    [file] = out.glob("*model.safetensors")
    return file.read_bytes()
