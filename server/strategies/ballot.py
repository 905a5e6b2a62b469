"""A vote of branches over the answers in their replies, for self-consistency and DeepConf."""

from answers.extract import Answer
from answers.vote import Vote
from server.strategies.branches import Branch, Branches
from server.strategies.extraction import find_answer


class Ballot:
    """The votes of completed branches; its state is kept up to date in the response's summary."""

    def __init__(self, branches: Branches, answer: Answer) -> None:
        """Open the vote; `answer` finds a branch's answer in its reply."""
        self.branches = branches
        self.answer = answer
        self.vote = Vote()
        self.no_answer = 0
        self.best: dict[str | None, Branch] = {}  # by answer; None: of those without a vote. Others give back outputs
        self._update_summary()

    async def add(self, branch: Branch, weight: float | None) -> None:
        """Add a completed branch, which votes if it has a weight and its reply an answer."""
        answer = None
        if weight is not None:
            answer = await find_answer(self.answer, branch.text)
            if answer is None:
                self.no_answer += 1
            else:
                self.vote.add(answer, branch.mean_logprob, weight)
        self._keep_better(answer, branch)
        self._update_summary()

    def winner(self) -> Branch:
        """Return the first branch with the winning answer; without any vote, the branch likeliest per token.

        Raises:
            Exception: that of a branch, if none completed.
        """
        if not self.best:
            raise self.branches.failure()
        return self.best[next(iter(self.vote.ranking()), None)]

    def _keep_better(self, answer: str | None, branch: Branch) -> None:
        other = self.best.setdefault(answer, branch)
        if other is branch:
            return
        is_better = branch.mean_logprob > other.mean_logprob if answer is None else branch.number < other.number
        self.best[answer], loser = (branch, other) if is_better else (other, branch)
        loser.give_back_outputs()

    def _update_summary(self) -> None:
        ranking, agreement = self.vote.ranking(), self.vote.agreement()
        self.branches.summary |= {
            "answer": next(iter(ranking), None),
            "votes": {answer: self.vote.counts[answer] for answer in ranking},
            "no_answer": self.no_answer,
            "agreement": None if agreement is None else round(agreement, 6),
        }
