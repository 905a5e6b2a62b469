"""A task: questions, and a checker for replies if they have answers. Knows nothing of who asks them."""

from dataclasses import dataclass

from loadtest.tasks.text_checkers import TextChecker, Verdict


@dataclass(frozen=True)
class Question:
    """A question to ask."""

    index: int  # its position in the task
    text: str  # the user message
    answer: str | None  # in its checker's normal form; None if the task has no answers
    max_tokens: int | None = None  # None: the scenario's


@dataclass(frozen=True)
class LoadedTask:
    """Questions, and what a correct reply is. Close it after use: a checker may have processes."""

    name: str
    questions: list[Question]
    checker: TextChecker | None = None  # None if the task has no answers

    def find(self, reply: str) -> str | None:
        """Return the answer in a reply, in its normal form: equal answers give equal strings."""
        return self.checker.find(reply) if self.checker else None

    async def check(self, question: Question, reply: str) -> Verdict | None:
        """Return whether a reply is correct, and why not; None if the task has no answers."""
        if self.checker is None or question.answer is None:
            return None
        return await self.checker.check(question.answer, reply)

    def close(self) -> None:
        """End the checker's processes; waits for running checks, which takes seconds at most."""
        if self.checker:
            self.checker.close()
