"""Sequential refinement: the model is shown its answer and asked for a better one, round after round."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from answers.extract import Answer, after_thinking
from server.strategies.base import MIN_BRANCHES, Strategy
from server.strategies.branches import Branch, Branches


class Refinement(Strategy):
    """Up to `rounds` replies, each after the one before; stops when two in a row give the same answer."""

    type: Literal["refinement"] = "refinement"
    limit_field: ClassVar[str] = "rounds"
    rounds: int = Field(
        default=3, ge=MIN_BRANCHES, description="Replies, the first included; number i has the seed plus i."
    )
    answer: Answer = Field(default=Answer(), description="How to find the answer in a reply.")

    @property
    def max_parallel(self) -> int:
        """One after another."""
        return 1

    async def run(self, branches: Branches) -> Branch:
        """The last reply. A round that fails or finds no room in the context leaves the one before it, as does one that
        is cut off after one that was not."""
        best: Branch | None = None
        prompt: Any | None = None  # the request's own
        answers: list[str | None] = []
        for number in range(self.rounds):
            branch = branches.start(prompt)
            await branch.task
            if branch.state != "completed":
                break
            if best and branch.cut_off and not best.cut_off:
                branches.report["stopped_by"] = "length"
                break
            best = branch
            answers.append(self.answer.extract(branch.text))
            branches.report |= {"answer": answers[-1], "answers": list(answers), "no_answer": answers.count(None)}
            left = self.rounds - number - 1
            if not left or (answers[-1] is not None and answers[-1:] == answers[-2:-1]):
                branches.never_started = left
                break
            prompt = await branches.next_prompt(after_thinking(branch.text))
            if prompt is None:
                branches.report["stopped_by"] = "context"
                break
        if best is None:
            raise branches.failure()
        return best
