"""DeepConf online (arXiv 2508.15260): cancel branches that lose confidence; the others vote, weighted by theirs."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from answers.extract import Answer
from em_sampler.validation import ParamsError
from server.strategies.ballot import Ballot
from server.strategies.base import MIN_BRANCHES, Strategy, require_sampling
from server.strategies.branches import CONFIDENCE_UNITS, Branch, Branches, EngineRequest


class DeepConf(Strategy):
    """The first `warmup` branches run to their end and set a threshold; later ones are cancelled if they fall below it.

    A token's confidence is minus the mean log-probability of its `top` candidates; a group's is the mean over `window`
    tokens in a row; a branch's is that of its least confident group. Tokens without a choice are not counted.
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

    def check(self, engine_request: EngineRequest) -> None:
        """Check that samples can differ and that the engine returns enough candidates with their log-probabilities.

        Raises:
            ParamsError: if not.
        """
        require_sampling(engine_request.sampling_params, self.type)
        if not engine_request.logprobs_mode.endswith("_logprobs"):
            problem = f"got 'deepconf'; this server runs with --logprobs-mode {engine_request.logprobs_mode}"
            raise ParamsError("body.strategy.type", f"{problem} and has no log-probabilities")
        if 0 <= engine_request.max_logprobs < self.top:
            problem = f"got {self.top}; this server allows up to {engine_request.max_logprobs}"
            raise ParamsError("body.strategy.top", problem)
        if engine_request.sampling_params.logprob_token_ids:
            raise ParamsError("body.logprob_token_ids", "cannot be combined with deepconf, which needs top candidates")

    def keep_going(self, branches: Branches, branch: Branch) -> bool:
        """Return whether the branch's last full window is at or above the threshold, once the warm-up has set it."""
        threshold: float | None = branches.summary.get("threshold")
        sums = branch.confidence_sums
        if threshold is None or branch.number < self.warmup or len(sums) <= self.window:
            return True
        return (sums[-1] - sums[-1 - self.window]) / self.window / CONFIDENCE_UNITS >= threshold

    async def run(self, branches: Branches) -> Branch:
        """Run the warm-up, set the threshold, run the rest; branches at or above the threshold vote."""
        for _ in range(self.warmup):
            branches.start()
        warmup = [branch async for branch in branches.as_they_end() if branch.state == "completed"]
        if not warmup:
            raise branches.failure()
        confidences = [self._confidence(branch) for branch in warmup]
        threshold = quantile([each for each in confidences if each is not None], 1 - self.keep)
        ballot = Ballot(branches, self.answer)
        branches.summary["threshold"] = threshold
        for branch in warmup:
            await self._vote(ballot, branch, threshold)
        if self._has_consensus(ballot):
            branches.never_started = self.n - self.warmup
        else:
            for _ in range(self.n - self.warmup):
                branches.start()
            async for branch in branches.as_they_end():
                if branch.state == "completed":
                    await self._vote(ballot, branch, threshold)
                if self._has_consensus(ballot):
                    await branches.cancel_running()
        return ballot.winner()

    async def _vote(self, ballot: Ballot, branch: Branch, threshold: float | None) -> None:
        weight = self._confidence(branch)
        if weight is not None and threshold is not None and weight < threshold:
            weight = None
        await ballot.add(branch, weight)

    def _confidence(self, branch: Branch) -> float | None:
        """Return the lowest mean confidence over any `window` tokens, over all tokens if the branch has fewer.

        None if no token had a choice: such a branch says nothing about its answer.
        """
        sums = branch.confidence_sums
        size = min(self.window, len(sums) - 1)
        if not size:
            return None
        return min(after - before for before, after in zip(sums, sums[size:], strict=False)) / size / CONFIDENCE_UNITS

    def _has_consensus(self, ballot: Ballot) -> bool:
        agreement = ballot.vote.agreement()
        return agreement is not None and agreement >= self.consensus


def quantile(values: Sequence[float], share: float) -> float | None:
    """Return the value below which `share` of `values` lie, linear between neighbours; None without values.

    A position beside a value by no more than rounding is that value's: or the branch whose confidence it is would fall
    below a threshold that it has set itself.
    """
    if not values:
        return None
    position = round(share * (len(values) - 1), 9)
    lower, *rest = sorted(values)[int(position) :]
    return lower + (rest[0] - lower) * (position % 1) if rest else lower
