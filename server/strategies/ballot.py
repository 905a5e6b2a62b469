"""A vote of branches over the answers in their replies, for self-consistency and DeepConf."""

from answers.extract import Answer
from answers.vote import Vote
from server.strategies.branches import Branch, Branches


class Ballot:
    """The votes of completed branches; its state is kept up to date in the response's summary."""

    def __init__(self, branches: Branches, answer: Answer) -> None:
        """Open the vote; `answer` finds a branch's answer in its reply."""
        self.branches = branches
        self.answer = answer
        self.vote = Vote()
        self.branches_by_answer: dict[str | None, list[Branch]] = {}  # None: branches without an answer
        self._update_summary()

    def add(self, branch: Branch, weight: float) -> None:
        """Add a completed branch, which votes if its reply has an answer."""
        answer = self.answer.extract(branch.text)
        self.branches_by_answer.setdefault(answer, []).append(branch)
        if answer is not None:
            self.vote.add(answer, branch.mean_logprob, weight)
        self._update_summary()

    def winner(self) -> Branch:
        """Return the first branch with the winning answer; without any answer, the branch likeliest per token.

        Raises:
            Exception: that of a branch, if none completed.
        """
        if not self.branches_by_answer:
            raise self.branches.failure()
        leader = next(iter(self.vote.ranking()), None)
        if leader is None:
            return max(self.branches_by_answer[None], key=lambda branch: branch.mean_logprob)
        return min(self.branches_by_answer[leader], key=lambda branch: branch.number)

    def _update_summary(self) -> None:
        ranking, agreement = self.vote.ranking(), self.vote.agreement()
        self.branches.summary |= {
            "answer": next(iter(ranking), None),
            "votes": {answer: self.vote.counts[answer] for answer in ranking},
            "no_answer": len(self.branches_by_answer.get(None, ())),
            "agreement": None if agreement is None else round(agreement, 6),
        }
