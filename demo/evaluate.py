"""Measures the demo model on held-out problems: greedy, one sample at temperature 1, a vote of samples.

Plain transformers in the dtype of the weights, no server: the figures that serving has to match or beat.
"""

import argparse
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from demo import MODEL_PATH
from demo.problems import Problem, check, extract_answer, problems

SEED: Final = 250_515_134
VOTES: Final = 16
NEW_TOKENS: Final = 128
THREADS: Final = 1  # the model is too small for two to help, and on a busy machine they stall each other
ROWS: Final = 256  # sequences decoded side by side


class Solver:
    """The model with its tokenizer: questions in, replies out."""

    def __init__(self, path: Path = MODEL_PATH) -> None:
        """Loads the folder at `path` in the dtype of its weights; never asks the network."""
        self.tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(path, local_files_only=True))
        self.tokenizer.padding_side = "left"  # replies begin where the padded prompts end
        self.model = cast(
            PreTrainedModel,
            AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype="auto"),
        )

    def replies(self, questions: Sequence[str], temperature: float) -> list[str]:
        """One reply for each question; temperature 0 is greedy, above it torch's global seed decides."""
        # Neighbours in length share a batch, so that few rows wait for the longest.
        order = sorted(range(len(questions)), key=lambda index: len(questions[index]))
        found: dict[int, str] = {}
        for start in range(0, len(order), ROWS):
            chunk = order[start : start + ROWS]
            found.update(zip(chunk, self._batch([questions[i] for i in chunk], temperature), strict=True))
        return [found[index] for index in range(len(questions))]

    @torch.inference_mode()
    def _batch(self, questions: Sequence[str], temperature: float) -> list[str]:
        chats = [[{"role": "user", "content": question}] for question in questions]
        encoded = self.tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        inputs = cast(Mapping[str, torch.Tensor], encoded)
        # top_k=0 and top_p=1: transformers would otherwise cut the distribution at 50 tokens.
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        tokens = self.model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=NEW_TOKENS, **(how if temperature > 0 else {"do_sample": False})
        )
        replies = tokens[:, inputs["input_ids"].shape[1] :]  # [rows, new tokens]
        return self.tokenizer.batch_decode(replies, skip_special_tokens=True)


def accuracy(asked: Sequence[Problem], replies: Sequence[str]) -> float:
    """The share of replies that end in the right answer."""
    return sum(map(check, asked, replies)) / len(asked)


def vote(replies: Sequence[str]) -> int | None:
    """The most frequent answer; None when no reply has one. Ties go to the answer that came first."""
    answers = [answer for reply in replies if (answer := extract_answer(reply)) is not None]
    return Counter(answers).most_common(1)[0][0] if answers else None


def vote_accuracy(asked: Sequence[Problem], samples: Sequence[Sequence[str]]) -> float:
    """The share of problems whose voted answer is right; samples[k][i] is reply k to problem i."""
    ballots = zip(*samples, strict=True)
    right = sum(vote(ballot) == problem.answer for problem, ballot in zip(asked, ballots, strict=True))
    return right / len(asked)


def report(solver: Solver, n: int, votes: int) -> str:
    """A table of accuracies over `n` held-out problems."""
    asked = problems("held_out", n, SEED)
    questions = [problem.question for problem in asked]
    torch.manual_seed(SEED)
    greedy = accuracy(asked, solver.replies(questions, 0.0))
    samples = [solver.replies(questions, 1.0) for _ in range(votes)]
    single = [accuracy(asked, replies) for replies in samples]
    return "\n".join(
        (
            f"held-out problems              {n}",
            f"greedy                         {greedy:.3f}",
            f"temperature 1, mean of {votes:<2}      {sum(single) / votes:.3f}",
            f"temperature 1, vote of {votes:<2}      {vote_accuracy(asked, samples):.3f}",
        )
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_PATH)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--votes", type=int, default=VOTES)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    started = time.monotonic()
    print(report(Solver(options.model), options.n, options.votes))
    print(f"seconds                        {time.monotonic() - started:.0f}")


if __name__ == "__main__":
    main()
