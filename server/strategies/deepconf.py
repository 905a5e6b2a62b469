"""DeepConf online (arXiv 2508.15260): branches that lose confidence are ended on the way, the others vote by theirs."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from answers.extract import Answer
from em_sampler.validation import ParamsError
from server.strategies.ballot import Ballot
from server.strategies.base import MIN_BRANCHES, Strategy, require_sampling
from server.strategies.branches import Branch, Branches


class DeepConf(Strategy):
    """The first `warmup` branches run to their end and set a threshold; later ones must keep above it.

    A token's confidence is minus the mean log-probability of its likeliest candidates; a group's is the mean over
    `window` tokens; a branch's is that of its least confident group.
    """

    type: Literal["deepconf"] = "deepconf"
    limit_field: ClassVar[str] = "n"
    n: int = Field(default=16, ge=MIN_BRANCHES, description="Branches at most, those of the warm-up included.")
    warmup: int = Field(default=4, ge=1, description="Branches that set the threshold; 16 in the paper. Below n.")
    keep: float = Field(
        default=0.9, gt=0, lt=1, description="Share of the warm-up that is above it: 0.9 in DeepConf-high, 0.1 in -low."
    )
    window: int = Field(default=2048, ge=1, le=100_000, description="Tokens of a group.")
    top: int = Field(default=20, ge=2, le=20, description="Candidates that make a token's confidence.")
    consensus: float = Field(
        default=0.95, gt=0, le=1, description="Share of the weighted votes at which the rest is ended."
    )
    answer: Answer = Field(default=Answer(), description="How to find the answer in a reply.")

    @model_validator(mode="after")
    def _smaller(self) -> Self:
        if self.warmup >= self.n:
            raise ValueError(f"warmup {self.warmup} must be below n {self.n}")
        return self

    @property
    def top_logprobs(self) -> int:
        """So many of the engine's top log-probabilities."""
        return self.top

    def check(self, sampling_params: Any, max_logprobs: int) -> None:
        """It needs samples that differ, and the engine's top candidates."""
        require_sampling(sampling_params, self.type)
        if 0 <= max_logprobs < self.top:
            raise ParamsError("body.strategy.top", f"got {self.top}; this server allows up to {max_logprobs}")
        if sampling_params.logprob_token_ids:
            raise ParamsError("body.logprob_token_ids", "cannot be combined with deepconf, which needs top candidates")

    def keep_going(self, branches: Branches, branch: Branch) -> bool:
        """Whether its last full window is above the threshold, which the warm-up has set."""
        threshold, sums = branches.report.get("threshold"), branch.confidence_sums
        if threshold is None or branch.number < self.warmup or len(sums) <= self.window:
            return True
        return (sums[-1] - sums[-1 - self.window]) / self.window >= float(threshold)

    async def run(self, branches: Branches) -> Branch:
        """Warm-up, threshold, the rest; a vote weighted by confidence, of those at or above the threshold."""
        for _ in range(self.warmup):
            branches.start()
        warm = [branch async for branch in branches.as_they_end() if branch.state == "completed"]
        if not warm:
            raise branches.failure()
        threshold = quantile([self._confidence(branch) for branch in warm], 1 - self.keep)
        ballot = Ballot(branches, self.answer)
        branches.report["threshold"] = threshold
        for branch in warm:
            self._count(ballot, branch, threshold)
        if self._agreed(ballot):
            branches.never_started = self.n - self.warmup
        else:
            for _ in range(self.n - self.warmup):
                branches.start()
            async for branch in branches.as_they_end():
                if branch.state == "completed":
                    self._count(ballot, branch, threshold)
                if self._agreed(ballot):
                    await branches.cancel_running()
        return ballot.winner()

    def _count(self, ballot: Ballot, branch: Branch, threshold: float) -> None:
        if (weight := self._confidence(branch)) >= threshold:
            ballot.add(branch, weight)

    def _confidence(self, branch: Branch) -> float:
        """Of its least confident group; of the whole where it is shorter than one."""
        sums = branch.confidence_sums
        size = min(self.window, len(sums) - 1)
        return min(after - before for before, after in zip(sums, sums[size:], strict=False)) / size if size else 0.0

    def _agreed(self, ballot: Ballot) -> bool:
        agreement = ballot.vote.agreement()
        return agreement is not None and agreement >= self.consensus


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie, interpolated linearly."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
