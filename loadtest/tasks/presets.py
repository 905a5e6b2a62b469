"""Formats of question files: those in which known benchmarks are published, and the user's own. Reads no files."""

from collections.abc import Callable
from dataclasses import dataclass

from loadtest.scenario import FileTask
from loadtest.tasks.checkers import TaskChecker
from loadtest.tasks.completion_checker import Completion
from loadtest.tasks.rows import Row

QUESTION = "{question}"
BOXED_PROMPT = QUESTION + "\n\nReason step by step, and end with the final answer in \\boxed{}."
CODE_PROMPT = QUESTION + "\n\nReply with one block of Python code, between ```python and ```."
COMPLETION_PROMPT = (
    "Complete this Python function:\n\n```python\n" + QUESTION + "\n```\n\n"
    "Reply with the whole function in one block of Python code, between ```python and ```."
)

_PROBLEM = ("problem", "Problem", "question", "Question")
_ANSWER = ("expected_answer", "answer", "Answer")

Reader = Callable[[Row], tuple[str, str]]  # the name of a field, for errors, and the text that is taken from the row


@dataclass(frozen=True)
class FileFormat:
    """Where a row holds the question and the answer, how to ask the one and to check the other."""

    question: Reader
    answer: Reader
    checker: TaskChecker
    prompt: str
    pattern: str | None = None  # for the answer inside its field: the first group, or the match


def _field(*names: str) -> Reader:
    """Return what reads the first of some fields that a row has."""
    return lambda row: row.first(*names)


def _answer_or_solution(row: Row) -> tuple[str, str]:
    """Return the answer, or the solution that has it in its last box."""
    name, text = row.first(*_ANSWER, "solution")
    if name == "solution" and "\\boxed{" not in text:
        raise row.error(name, "has no \\boxed{}")
    return name, text


def _humaneval_question(row: Row) -> tuple[str, str]:
    return "prompt", row.text("prompt").strip("\n")


def _humaneval_answer(row: Row) -> tuple[str, str]:
    entry_point = row.text("entry_point")
    if not entry_point.isidentifier():
        raise row.error("entry_point", "must be the name of a function")
    tests = f"{row.text('test')}\n\ncheck({entry_point})\n"
    return "test", Completion(row.text("prompt"), entry_point, tests).to_json()


def _mbpp_question(row: Row) -> tuple[str, str]:
    """Show the tests, as in MBPP's own protocol: the name of the function is only in them."""
    name, text = row.first("text", "prompt")
    return name, f"{text}\n\nYour code should pass these tests:\n\n{row.text('test_list')}"


def _mbpp_answer(row: Row) -> tuple[str, str]:
    parts = row.optional("test_imports"), row.optional("test_setup_code"), row.text("test_list")
    return "test_list", "\n".join(filter(None, parts))


PRESETS = {
    "math500": FileFormat(_field(*_PROBLEM), _answer_or_solution, "boxed", BOXED_PROMPT),
    "minerva": FileFormat(_field(*_PROBLEM), _answer_or_solution, "boxed", BOXED_PROMPT),
    "aime": FileFormat(_field(*_PROBLEM), _field(*_ANSWER), "number", BOXED_PROMPT),
    "amc": FileFormat(_field(*_PROBLEM), _field(*_ANSWER), "number", BOXED_PROMPT),
    "gsm8k": FileFormat(_field("question"), _field("answer"), "number", BOXED_PROMPT, r"####\s*(.+)"),
    "humaneval": FileFormat(_humaneval_question, _humaneval_answer, "completion", COMPLETION_PROMPT),
    "mbpp": FileFormat(_mbpp_question, _mbpp_answer, "python", CODE_PROMPT),
    # Only with the tests in the file: SciCode's own release has their target values in a second file (HDF5).
    "scicode": FileFormat(_field("prompt", "question"), _field("test", "tests", "test_list"), "python", CODE_PROMPT),
}


def format_of(task: FileTask) -> FileFormat:
    """Return the format that a scenario gives for the user's own file."""
    return FileFormat(_field(task.question), _field(task.answer), task.checker, task.prompt, task.answer_pattern)
