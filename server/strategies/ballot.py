"""A vote of branches over the answers in their replies, as self-consistency and DeepConf hold it."""

from answers.extract import Answer
from answers.vote import Vote
from server.strategies.branches import Branch, Branches


class Ballot:
    """A vote of branches, with its state in the response."""

    def __init__(self, branches: Branches, answer: Answer) -> None:
        self.branches = branches
        self.answer = answer
        self.vote = Vote()
        self.voters: dict[str | None, list[Branch]] = {}
        self._update_report()

    def add(self, branch: Branch, weight: float) -> None:
        """Count a completed branch's vote, if it has an answer."""
        answer = self.answer.extract(branch.text)
        self.voters.setdefault(answer, []).append(branch)
        if answer is not None:
            self.vote.add(answer, branch.mean_logprob, weight)
        self._update_report()

    def winner(self) -> Branch:
        """Return the first branch with the winning answer; if there is no answer, the likeliest branch per token.

        Raises:
            Exception: the branches' own, if none completed.
        """
        if not self.voters:
            raise self.branches.failure()
        leader = next(iter(self.vote.ranking()), None)
        if leader is None:
            return max(self.voters[None], key=lambda branch: branch.mean_logprob)
        return min(self.voters[leader], key=lambda branch: branch.number)

    def _update_report(self) -> None:
        ranking, agreement = self.vote.ranking(), self.vote.agreement()
        self.branches.report |= {
            "answer": next(iter(ranking), None),
            "votes": {answer: self.vote.counts[answer] for answer in ranking},
            "no_answer": len(self.voters.get(None, ())),
            "agreement": None if agreement is None else round(agreement, 6),
        }
