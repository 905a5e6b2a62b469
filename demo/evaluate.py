"""The demo model's accuracy on held-out problems: greedy, sampled at temperature 1, and by a vote over samples.

Plain transformers in the dtype of the weights, no server: the baseline for serving. The vote is independent of
answers/vote.py on purpose, so that other code checks the server's.
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
MAX_NEW_TOKENS: Final = 128
THREADS: Final = 1  # the model is too small for two to help, and on a busy machine they wait for each other
BATCH_SIZE: Final = 256  # sequences decoded side by side


class Solver:
    """The model with its tokenizer: questions in, replies out."""

    def __init__(self, path: Path = MODEL_PATH) -> None:
        """Load the folder at `path` in the dtype of its weights, without network access."""
        self.tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(path, local_files_only=True))
        self.tokenizer.padding_side = "left"  # replies begin where the padded prompts end
        self.model = cast(
            PreTrainedModel,
            AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype="auto"),
        )

    def replies(self, questions: Sequence[str], temperature: float) -> list[str]:
        """Return one reply to each question; temperature 0 is greedy, otherwise torch's global random state samples."""
        # Similar lengths share a batch: little padding.
        order = sorted(range(len(questions)), key=lambda index: len(questions[index]))
        found: dict[int, str] = {}
        for start in range(0, len(order), BATCH_SIZE):
            chunk = order[start : start + BATCH_SIZE]
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
        # top_k=0 and top_p=1: transformers would otherwise sample from the 50 likeliest tokens alone.
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        tokens = self.model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=MAX_NEW_TOKENS, **(sampling if temperature > 0 else {"do_sample": False})
        )
        replies = tokens[:, inputs["input_ids"].shape[1] :]  # [rows, new tokens]
        return self.tokenizer.batch_decode(replies, skip_special_tokens=True)


def accuracy(asked: Sequence[Problem], replies: Sequence[str]) -> float:
    """Return the share of replies that end in the right answer."""
    return sum(map(check, asked, replies)) / len(asked)


def vote(replies: Sequence[str]) -> int | None:
    """Return the most frequent answer, at a tie the earlier one; None if no reply has an answer."""
    answers = [answer for reply in replies if (answer := extract_answer(reply)) is not None]
    return Counter(answers).most_common(1)[0][0] if answers else None


def vote_accuracy(asked: Sequence[Problem], samples: Sequence[Sequence[str]]) -> float:
    """Return the share of problems whose voted answer is right; samples[k][i] is reply k to problem i."""
    ballots = zip(*samples, strict=True)
    right = sum(vote(ballot) == problem.answer for problem, ballot in zip(asked, ballots, strict=True))
    return right / len(asked)


def report(solver: Solver, n: int, votes: int) -> str:
    """Return a table of accuracies over `n` held-out problems."""
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
    """Run the command line."""
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
