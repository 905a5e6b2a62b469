"""Self-consistency (arXiv 2203.11171): sample one prompt several times and take the most frequent answer."""

import math
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from answers.extract import Answer
from answers.vote import Vote
from server.strategies.ballot import Ballot
from server.strategies.base import MIN_BRANCHES, Strategy, require_sampling
from server.strategies.branches import Branch, Branches, EngineRequest

UNKNOWN_WEIGHT = 1e-6  # of a branch whose stats are missing


class SelfConsistency(Strategy):
    """`n` samples and a majority vote. A tie goes to the answer whose samples have the higher mean log-probability."""

    type: Literal["self_consistency"] = "self_consistency"
    limit_field: ClassVar[str] = "n"
    n: int = Field(default=8, ge=MIN_BRANCHES, description="Samples; number i has the request's seed plus i.")
    answer: Answer = Field(default=Answer(), description="How to find the answer in a reply.")
    parallel: int | None = Field(
        default=None, ge=1, description="Samples at a time; when one ends, the next starts. Default: all n at once."
    )
    early_stop: bool = Field(
        default=False, description="Once no answer can overtake the leader, cancel running samples and start no more."
    )
    confidence: float | None = Field(
        default=None,
        gt=0.5,
        lt=1,
        description="With early_stop: also stop once the leader is the majority's answer with this probability.",
    )
    weights: Literal["equal", "entropy"] = Field(
        default="equal", description="entropy: a vote weighs exp(-mean entropy of its tokens in nats)."
    )

    @model_validator(mode="after")
    def _check_confidence(self) -> Self:
        if self.confidence is not None and not self.early_stop:
            raise ValueError("`confidence` is a rule of early_stop, which is off")
        if self.confidence is not None and self.weights != "equal":
            raise ValueError("`confidence` counts votes; it does not go with weights")
        return self

    @property
    def max_parallel(self) -> int:
        """`parallel`, but no more than `n`."""
        return min(self.parallel or self.n, self.n)

    def check(self, engine_request: EngineRequest) -> None:
        """Check that samples can differ.

        Raises:
            ParamsError: if they cannot.
        """
        require_sampling(engine_request.sampling_params, self.type)

    async def run(self, branches: Branches) -> Branch:
        """Sample and vote, with no more samples than the vote needs if `early_stop` is set."""
        for _ in range(self.max_parallel):
            branches.start()
        ballot, ended, decided = Ballot(branches, self.answer), 0, False
        async for branch in branches.as_they_end():
            ended += 1
            if branch.state == "completed":
                await ballot.add(branch, await self._weight(branch))
            # A branch that completes while others are being cancelled still votes, but the decision to stop stands.
            decided = decided or (self.early_stop and self._is_decided(ballot.vote, self.n - ended))
            if decided:
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

    def _is_decided(self, vote: Vote, remaining: int) -> bool:
        if vote.is_decided(remaining):
            return True
        return self.confidence is not None and vote.leader_probability() >= self.confidence
