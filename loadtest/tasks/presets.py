"""Formats of question files: those in which known benchmarks are published, and the user's own. Reads no files."""

from dataclasses import dataclass

from loadtest.scenario import Checker, FileTask

QUESTION = "{question}"
BOXED_PROMPT = QUESTION + "\n\nReason step by step, and end with the final answer in \\boxed{}."
CODE_PROMPT = QUESTION + "\n\nReply with one block of Python code, between ```python and ```."

_PROBLEM = ("problem", "Problem", "question", "Question")
_ANSWER = ("answer", "Answer")


@dataclass(frozen=True)
class FileFormat:
    """Which fields hold the question and the answer, how to ask the one and to check the other."""

    question: tuple[str, ...]  # names of the field: the first that a row has
    answer: tuple[str, ...]
    checker: Checker
    prompt: str
    pattern: str | None = None  # for the answer inside its field: the first group, or the match


PRESETS = {
    "math500": FileFormat(_PROBLEM, _ANSWER, "boxed", BOXED_PROMPT),
    "aime": FileFormat(_PROBLEM, _ANSWER, "number", BOXED_PROMPT),
    "amc": FileFormat(_PROBLEM, _ANSWER, "number", BOXED_PROMPT),
    "gsm8k": FileFormat(("question",), ("answer",), "number", BOXED_PROMPT, r"####\s*(.+)"),
    # Only with the tests in the file: SciCode's own release has their target values in a second file (HDF5).
    "scicode": FileFormat(("prompt", "question"), ("test", "tests", "test_list"), "python", CODE_PROMPT),
}


def format_of(task: FileTask) -> FileFormat:
    """Return the format that a scenario gives for the user's own file."""
    return FileFormat((task.question,), (task.answer,), task.checker, task.prompt, task.answer_pattern)
