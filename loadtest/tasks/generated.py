"""Questions that are generated from a seed: the demo model's problems, and synthetic prompts of random lengths."""

import math
import random
from collections.abc import Iterator

from demo.problems import problems
from loadtest.scenario import DemoTask, Lengths, ScenarioError, SyntheticTask
from loadtest.tasks.base import Question


def demo_questions(task: DemoTask) -> Iterator[Question]:
    """Yield held-out problems of the demo model."""
    for index, problem in enumerate(problems("held_out", task.count, task.seed)):
        yield Question(index, problem.question, str(problem.answer))


def synthetic_questions(task: SyntheticTask) -> Iterator[Question]:
    """Yield prompts with about the requested number of tokens.

    Each begins with its number. A server's prefix cache holds blocks of tokens (16 in vLLM), so prompts that differ
    within the first block share none, and every prompt costs what its length says. The number and the colon count as
    one token each; without the colon, one number could be the beginning of another.
    """
    rng = random.Random(task.seed)
    for index in range(task.count):
        prompt_tokens = _random_length(rng, task.prompt_tokens, "prompt_tokens")
        output_tokens = _random_length(rng, task.output_tokens, "output_tokens")
        yield Question(index, f"{index}:" + task.word * (prompt_tokens - 2), None, output_tokens)


def _random_length(rng: random.Random, lengths: Lengths, field: str) -> int:
    """Draw a length in tokens. `least` and `most` clip it, and move the mean if they clip often."""
    if lengths.least > lengths.most:
        raise ScenarioError(f"task.{field}: least is {lengths.least}; most must not be below, got {lengths.most}")
    if lengths.shape == "uniform":
        half_width = lengths.spread * math.sqrt(3)  # of the uniform distribution with this standard deviation
        length = rng.uniform(lengths.mean - half_width, lengths.mean + half_width)
    elif lengths.shape == "lognormal":
        variance = math.log1p((lengths.spread / lengths.mean) ** 2)  # of the logarithm
        length = rng.lognormvariate(math.log(lengths.mean) - variance / 2, math.sqrt(variance))
    else:
        length = rng.gauss(lengths.mean, lengths.spread)
    return round(min(max(length, lengths.least), lengths.most))
