"""Sequential refinement: in each round, show the model its last reply and ask for a better one."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from answers.extract import Answer, after_thinking
from server.strategies.base import MIN_BRANCHES, Strategy
from server.strategies.branches import Branch, Branches, NoNextPromptError
from server.strategies.extraction import find_answer


class Refinement(Strategy):
    """Up to `rounds` replies, one after another; stops early if two in a row give the same answer."""

    type: Literal["refinement"] = "refinement"
    limit_field: ClassVar[str] = "rounds"
    rounds: int = Field(
        default=3, ge=MIN_BRANCHES, description="Replies, the first included; number i has the request's seed plus i."
    )
    answer: Answer = Field(default=Answer(), description="How to find the answer in a reply.")

    @property
    def max_parallel(self) -> int:
        """One: each round needs the reply of the round before."""
        return 1

    async def run(self, branches: Branches) -> Branch:
        """Return the last round's reply.

        If a round fails, has no prompt, or is cut off although the round before was not, the reply of
        the round before is returned.
        """
        best: Branch | None = None
        prompt: Any | None = None  # None: the request's prompt
        answers: list[str | None] = []
        for number in range(self.rounds):
            branch = branches.start(prompt)
            await branch.task
            if branch.state != "completed":
                break
            if best and branch.cut_off and not best.cut_off:
                branches.summary["stopped_by"] = "length"
                break
            if best:
                best.give_back_outputs()
            best = branch
            answers.append(await find_answer(self.answer, branch.text))
            branches.summary |= {"answer": answers[-1], "answers": list(answers), "no_answer": answers.count(None)}
            left = self.rounds - number - 1
            if not left or (answers[-1] is not None and answers[-1:] == answers[-2:-1]):
                branches.never_started = left
                break
            try:
                prompt = await branches.next_prompt(after_thinking(branch.text))
            except NoNextPromptError as error:
                branches.summary["stopped_by"] = error.stopped_by
                break
        if best is None:
            raise branches.failure()
        return best
