"""DeepConf online (arXiv 2508.15260): cancel branches that lose confidence; the others vote, weighted by theirs."""

from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from answers.extract import Answer
from em_sampler.validation import ParamsError
from server.strategies.ballot import Ballot
from server.strategies.base import MIN_BRANCHES, Strategy, require_sampling
from server.strategies.branches import Branch, Branches


class DeepConf(Strategy):
    """The first `warmup` branches run to their end and set a threshold; later ones are cancelled if they fall below it.

    A token's confidence is minus the mean log-probability of its `top` candidates; a group's is the mean over `window`
    tokens in a row; a branch's is that of its least confident group.
    """

    type: Literal["deepconf"] = "deepconf"
    limit_field: ClassVar[str] = "n"
    n: int = Field(default=16, ge=MIN_BRANCHES, description="Most branches, those of the warm-up included.")
    warmup: int = Field(default=4, ge=1, description="Branches that set the threshold; 16 in the paper. Below n.")
    keep: float = Field(
        default=0.9,
        gt=0,
        lt=1,
        description="Share of the warm-up above the threshold: 0.9 in the paper's DeepConf-high, 0.1 in -low.",
    )
    window: int = Field(default=2048, ge=1, le=100_000, description="Tokens per group.")
    top: int = Field(default=20, ge=2, le=20, description="Candidates for a token's confidence.")
    consensus: float = Field(
        default=0.95, gt=0, le=1, description="Share of the weighted votes at which the other branches are cancelled."
    )
    answer: Answer = Field(default=Answer(), description="How to find the answer in a reply.")

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup >= self.n:
            raise ValueError(f"warmup {self.warmup} must be below n {self.n}")
        return self

    @property
    def top_logprobs(self) -> int:
        """`top`."""
        return self.top

    def check(self, sampling_params: Any, max_logprobs: int) -> None:
        """Check that samples can differ and that the engine returns enough candidates.

        Raises:
            ParamsError: if not.
        """
        require_sampling(sampling_params, self.type)
        if 0 <= max_logprobs < self.top:
            raise ParamsError("body.strategy.top", f"got {self.top}; this server allows up to {max_logprobs}")
        if sampling_params.logprob_token_ids:
            raise ParamsError("body.logprob_token_ids", "cannot be combined with deepconf, which needs top candidates")

    def keep_going(self, branches: Branches, branch: Branch) -> bool:
        """Return whether the branch's last full window is at or above the threshold, once the warm-up has set it."""
        threshold, sums = branches.summary.get("threshold"), branch.confidence_sums
        if threshold is None or branch.number < self.warmup or len(sums) <= self.window:
            return True
        return (sums[-1] - sums[-1 - self.window]) / self.window >= float(threshold)

    async def run(self, branches: Branches) -> Branch:
        """Run the warm-up, set the threshold, run the rest; branches at or above the threshold vote."""
        for _ in range(self.warmup):
            branches.start()
        warmup = [branch async for branch in branches.as_they_end() if branch.state == "completed"]
        if not warmup:
            raise branches.failure()
        threshold = float(np.quantile([self._confidence(branch) for branch in warmup], 1 - self.keep))
        ballot = Ballot(branches, self.answer)
        branches.summary["threshold"] = threshold
        for branch in warmup:
            self._vote(ballot, branch, threshold)
        if self._has_consensus(ballot):
            branches.never_started = self.n - self.warmup
        else:
            for _ in range(self.n - self.warmup):
                branches.start()
            async for branch in branches.as_they_end():
                if branch.state == "completed":
                    self._vote(ballot, branch, threshold)
                if self._has_consensus(ballot):
                    await branches.cancel_running()
        return ballot.winner()

    def _vote(self, ballot: Ballot, branch: Branch, threshold: float) -> None:
        if (weight := self._confidence(branch)) >= threshold:
            ballot.add(branch, weight)

    def _confidence(self, branch: Branch) -> float:
        """Return the lowest mean confidence over any `window` tokens, over all tokens if the branch has fewer."""
        sums = branch.confidence_sums
        size = min(self.window, len(sums) - 1)
        return min(after - before for before, after in zip(sums, sums[size:], strict=False)) / size if size else 0.0

    def _has_consensus(self, ballot: Ballot) -> bool:
        agreement = ballot.vote.agreement()
        return agreement is not None and agreement >= self.consensus
