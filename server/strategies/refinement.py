"""Sequential refinement: the model is shown its answer and asked for a better one, round after round."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from server.strategies.answers import Answer, spoken
from server.strategies.base import MIN_BRANCHES, Strategy
from server.strategies.run import Branch, Run


class Refinement(Strategy):
    """Up to `rounds` replies, each after the one before; stops when two in a row give the same answer."""

    type: Literal["refinement"] = "refinement"
    size: ClassVar[str] = "rounds"
    rounds: int = Field(
        default=3, ge=MIN_BRANCHES, description="Replies, the first included; number i has the seed plus i."
    )
    answer: Answer = Field(default=Answer(), description="How to find the answer in a reply.")

    @property
    def width(self) -> int:
        """One after another."""
        return 1

    async def run(self, run: Run) -> Branch:
        """The last reply. A round that fails or finds no room in the context leaves the one before it, as does one that
        is cut off after one that was not."""
        best: Branch | None = None
        prompt: Any | None = None  # the request's own
        answers: list[str | None] = []
        for number in range(self.rounds):
            branch = run.start(prompt)
            await branch.task
            if branch.state != "completed":
                break
            if best and branch.cut_off and not best.cut_off:
                run.report["stopped_by"] = "length"
                break
            best = branch
            answers.append(self.answer.of(branch.text))
            run.report |= {"answer": answers[-1], "answers": list(answers), "no_answer": answers.count(None)}
            left = self.rounds - number - 1
            if not left or (answers[-1] is not None and answers[-1:] == answers[-2:-1]):
                run.spared = left
                break
            prompt = await run.render(spoken(branch.text))
            if prompt is None:
                run.report["stopped_by"] = "context"
                break
        if best is None:
            raise run.failure()
        return best
