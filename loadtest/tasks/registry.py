"""Finds the questions and the checker for a scenario's task, by its type."""

from loadtest.scenario import DemoTask, FileTask, SyntheticTask, Task
from loadtest.tasks.base import LoadedTask
from loadtest.tasks.files import load_file
from loadtest.tasks.generated import demo_questions, synthetic_questions
from loadtest.tasks.presets import PRESETS, format_of
from loadtest.tasks.text_checkers import BOXED, TextChecker


def load_task(task: Task) -> LoadedTask:
    """Load the questions of a task.

    Raises:
        ScenarioError: if a file or a field of the scenario is wrong; names the file, its line and the field.
    """
    if isinstance(task, DemoTask):
        return LoadedTask(task.type, list(demo_questions(task)), TextChecker(BOXED))
    if isinstance(task, SyntheticTask):
        return LoadedTask(task.type, list(synthetic_questions(task)))
    return load_file(task, format_of(task) if isinstance(task, FileTask) else PRESETS[task.type])
