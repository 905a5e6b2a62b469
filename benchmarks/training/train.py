"""Training runs by `em-train`, each in a process of its own, and the prompts that they train on."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

from benchmarks.training.configs import SHARED_FLAGS, TRAIN_PROMPTS, TRAIN_SEED, Config
from demo.problems import Problem, stream


def train(config: Config, seed: int, out: Path, data: Path) -> Path:
    """Train into the folder `out` and return it; a run that is already complete is not repeated."""
    if (out / "model.safetensors").is_file():
        return out
    flags = SHARED_FLAGS | config.flags | {"seed": seed, "prompts": data, "out": out}
    command = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    log = out.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, "-m", "em_train.cli", config.command, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            check=True,
        )
    return out


def write_prompts(path: Path) -> Path:
    """Write chains of six operators; no test problem is among them, as demo's splits share no question."""
    chains = (problem for problem in stream("train", TRAIN_SEED) if _operator_count(problem) == 6)
    rows = [{"prompt": p.question, "answer": str(p.answer)} for p in islice(chains, TRAIN_PROMPTS)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _operator_count(problem: Problem) -> int:
    return sum(problem.question.count(sign) for sign in "+-*")
