"""The form of a file with questions, and the forms in which known benchmarks are published. Reads no file itself."""

from dataclasses import dataclass

from loadtest.scenario import Checker, FileTask

QUESTION = "{question}"
BOXED = QUESTION + "\n\nReason step by step, and end with the final answer in \\boxed{}."
PYTHON = QUESTION + "\n\nReply with one block of Python code, between ```python and ```."

_PROBLEM = ("problem", "Problem", "question", "Question")
_ANSWER = ("answer", "Answer")


@dataclass(frozen=True)
class Form:
    """Where a question and its answer are, and how the one is asked and the other checked."""

    question: tuple[str, ...]  # names of its field: the first that is there
    answer: tuple[str, ...]
    checker: Checker
    prompt: str
    pattern: str | None = None  # the part of the answer field that is the answer: its first group, or all of it


FORMS = {
    "math500": Form(_PROBLEM, _ANSWER, "boxed", BOXED),
    "aime": Form(_PROBLEM, _ANSWER, "number", BOXED),
    "amc": Form(_PROBLEM, _ANSWER, "number", BOXED),
    "gsm8k": Form(("question",), ("answer",), "number", BOXED, r"####\s*(.+)"),
    # In this form alone: SciCode's own release has its tests' targets in a second file (HDF5).
    "scicode": Form(("prompt", "question"), ("test", "tests", "test_list"), "python", PYTHON),
}


def form_of(task: FileTask) -> Form:
    """What the user said of a file of their own."""
    return Form((task.question,), (task.answer,), task.checker, task.prompt, task.answer_pattern)
