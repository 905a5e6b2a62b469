"""The training runs that the benchmark compares, and the problems and settings that they share."""

from dataclasses import dataclass
from typing import Any

import demo

SEEDS = (0, 1, 2)
TRAIN_SEED, TEST_SEED, DEV_SEED = 815_134, 250_515_134, 4_711  # of problems; TEST_SEED is demo/evaluate.py's
TRAIN_PROMPTS, TEST_PROBLEMS, SAMPLES_PER_PROBLEM = 4096, 500, 4
MAX_TOKENS = 128
SWEEP_LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4)
SHARED_FLAGS: dict[str, Any] = {
    "model": demo.MODEL_PATH,
    "max_tokens": MAX_TOKENS,
    "steps": 40,
    "batch_size": 128,
    "micro_batch_size": 32,
    "eval_every": 10,
    "eval_prompts": 64,
}


@dataclass(frozen=True)
class Config:
    """A way to train: the subcommand of em-train and its flags beside SHARED_FLAGS."""

    title: str
    command: str
    flags: dict[str, Any]


# Each learning rate is the best of SWEEP_LEARNING_RATES on other problems at temperature 1 (--sweep; the token reward
# does as well at 1e-5): a model of 1.6 million parameters does not change in 40 steps at the published 1e-6.
CONFIGS = {
    "ft": Config("EM-FT", "ft", {"fresh_every": 1, "learning_rate": 1e-4}),
    "token": Config("EM-RL, token", "rl", {"reward": "token", "learning_rate": 3e-5}),
    "sequence": Config("EM-RL, sequence", "rl", {"reward": "sequence", "learning_rate": 3e-5}),
    "correct": Config("RLOO, labels", "rl", {"reward": "correct", "learning_rate": 1e-4}),
}
UNTRAINED = "untrained"
