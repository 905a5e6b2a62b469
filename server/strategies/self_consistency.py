"""Self-consistency (arXiv 2203.11171): many samples of one prompt, the answer that most of them give."""

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from answers.extract import Answer
from answers.vote import Vote
from server.strategies.ballot import Ballot
from server.strategies.base import MIN_BRANCHES, Strategy, require_sampling
from server.strategies.branches import Branch, Branches

UNKNOWN_WEIGHT = 1e-6  # of a branch whose statistics did not come


class SelfConsistency(Strategy):
    """`n` samples and a vote; ties go to the answer whose samples the model finds likelier, per token."""

    type: Literal["self_consistency"] = "self_consistency"
    limit_field: ClassVar[str] = "n"
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
    def max_parallel(self) -> int:
        """As `parallel` says."""
        return min(self.parallel or self.n, self.n)

    def check(self, sampling_params: Any, max_logprobs: int) -> None:
        """It needs samples that differ."""
        require_sampling(sampling_params, self.type)

    async def run(self, branches: Branches) -> Branch:
        """The vote after each; no more samples once it is settled."""
        for _ in range(self.max_parallel):
            branches.start()
        ballot, seen, settled = Ballot(branches, self.answer), 0, False
        async for branch in branches.as_they_end():
            seen += 1
            if branch.state == "completed":
                ballot.add(branch, await self._weight(branch))
            # Settled is settled: what completes while the others are being cancelled still has its vote.
            settled = settled or (self.early_stop and self._settled(ballot.vote, self.n - seen))
            if settled:
                branches.never_started = self.n - len(branches.started)
                await branches.cancel_running()
            elif len(branches.started) < self.n:
                branches.start()
        return ballot.winner()

    async def _weight(self, branch: Branch) -> float:
        if self.weights == "equal":
            return 1.0
        entropy = await branch.mean_entropy()
        return UNKNOWN_WEIGHT if entropy is None else math.exp(-entropy)

    def _settled(self, vote: Vote, remaining: int) -> bool:
        return vote.is_decided(remaining) or (
            self.confidence is not None and vote.leader_probability() >= self.confidence
        )
