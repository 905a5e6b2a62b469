"""Self-consistency (arXiv 2203.11171): many samples of one prompt, the answer that most of them give."""

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from server.strategies.answers import Answer
from server.strategies.base import MIN_BRANCHES, Strategy, must_sample
from server.strategies.run import Branch, Run
from server.strategies.vote import Vote

UNKNOWN_WEIGHT = 1e-6  # of a branch whose statistics did not come


class SelfConsistency(Strategy):
    """`n` samples and a vote; ties go to the answer whose samples the model finds likelier, per token."""

    type: Literal["self_consistency"] = "self_consistency"
    size: ClassVar[str] = "n"
    n: int = Field(default=8, ge=MIN_BRANCHES, description="Samples; number i has the request's seed plus i.")
    answer: Answer = Field(default=Answer(), description="How to find the answer in a reply.")
    parallel: int | None = Field(
        default=None, ge=1, description="Samples at a time, a new one as each ends; default: all n at once."
    )
    early_stop: bool = Field(
        default=False, description="Once no outcome can overtake the leader, end what is running and start no more."
    )
    confidence: float | None = Field(
        default=None,
        gt=0.5,
        lt=1,
        description="With early_stop: also once the leader is the majority's answer with this probability.",
    )
    weights: Literal["equal", "entropy"] = Field(
        default="equal", description="entropy: a vote weighs exp(-mean entropy of its tokens, in nats)."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.confidence is not None and not self.early_stop:
            raise ValueError("`confidence` is a rule of early_stop, which is off")
        if self.confidence is not None and self.weights != "equal":
            raise ValueError("`confidence` counts votes; it does not go with weights")
        return self

    @property
    def width(self) -> int:
        """As `parallel` says."""
        return min(self.parallel or self.n, self.n)

    def check(self, sampling_params: Any, max_logprobs: int) -> None:
        """It needs samples that differ."""
        must_sample(sampling_params, self.type)

    async def run(self, run: Run) -> Branch:
        """The vote after each; no more samples once it is settled."""
        for _ in range(self.width):
            run.start()
        ballot, seen, settled = Ballot(run, self.answer), 0, False
        async for branch in run.ended():
            seen += 1
            if branch.state == "completed":
                ballot.add(branch, await self._weight(branch))
            # Settled is settled: what completes while the others are being cancelled still has its vote.
            settled = settled or (self.early_stop and self._settled(ballot.vote, self.n - seen))
            if settled:
                run.spared = self.n - len(run.branches)
                await run.cancel_running()
            elif len(run.branches) < self.n:
                run.start()
        return ballot.winner()

    async def _weight(self, branch: Branch) -> float:
        if self.weights == "equal":
            return 1.0
        entropy = await branch.mean_entropy()
        return UNKNOWN_WEIGHT if entropy is None else math.exp(-entropy)

    def _settled(self, vote: Vote, remaining: int) -> bool:
        return vote.decided(remaining) or (self.confidence is not None and vote.posterior() >= self.confidence)


class Ballot:
    """A vote of branches, told in the response as it stands."""

    def __init__(self, run: Run, answer: Answer) -> None:
        self.run = run
        self.answer = answer
        self.vote = Vote()
        self.voters: dict[str | None, list[Branch]] = {}
        self._tell()

    def add(self, branch: Branch, weight: float) -> None:
        """A completed branch's vote, if it has an answer."""
        answer = self.answer.of(branch.text)
        self.voters.setdefault(answer, []).append(branch)
        if answer is not None:
            self.vote.add(answer, branch.mean_logprob, weight)
        self._tell()

    def winner(self) -> Branch:
        """The first branch with the winning answer. Where there is no answer, the likeliest per token.

        Raises:
            Exception: of the branches, where none was completed.
        """
        if not self.voters:
            raise self.run.failure()
        leader = next(iter(self.vote.ranking()), None)
        if leader is None:
            return max(self.voters[None], key=lambda branch: branch.mean_logprob)
        return min(self.voters[leader], key=lambda branch: branch.number)

    def _tell(self) -> None:
        ranking, agreement = self.vote.ranking(), self.vote.agreement()
        self.run.report |= {
            "answer": next(iter(ranking), None),
            "votes": {answer: self.vote.counts[answer] for answer in ranking},
            "no_answer": len(self.voters.get(None, ())),
            "agreement": None if agreement is None else round(agreement, 6),
        }
