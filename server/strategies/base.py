"""The base class of strategies: a frozen pydantic model whose fields a request may set, with one method to run."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from em_sampler.validation import ParamsError
from server.strategies.branches import Branch, Branches

MIN_BRANCHES = 2
MAX_BRANCHES = 64  # of one request, unless the operator sets --strategy-max-branches
GREEDY_TEMPERATURE = 1e-5  # vLLM samples greedily below it: _SAMPLING_EPS in vllm/sampling_params.py


class Strategy(BaseModel, ABC):
    """Test-time scaling: several engine requests (branches) for one HTTP request, of which one becomes the reply."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    type: str
    limit_field: ClassVar[str]  # name of the field with the number of branches, which the operator caps

    @property
    def max_branches(self) -> int:
        """Branches that the strategy starts at most."""
        count: int = getattr(self, self.limit_field)
        return count

    @property
    def max_parallel(self) -> int:
        """Branches that run at the same time at most: what the request takes of the server's limit."""
        return self.max_branches

    @property
    def top_logprobs(self) -> int:
        """Candidates per token whose log-probabilities the strategy needs for confidence; 0 if it needs none."""
        return 0

    def summary_fields(self) -> dict[str, Any]:
        """Return what the response's summary repeats of the request."""
        return {"type": self.type, self.limit_field: self.max_branches}

    def check(self, sampling_params: Any, max_logprobs: int) -> None:
        """Check that the strategy can work with the engine request; `max_logprobs` is the server's limit, -1 for none.

        Raises:
            ParamsError: if it cannot.
        """

    def keep_going(self, branches: Branches, branch: Branch) -> bool:
        """Return False to cancel a running branch. Called after each of its outputs."""
        return True

    @abstractmethod
    async def run(self, branches: Branches) -> Branch:
        """Run the strategy and return the winning branch; branches still running are cancelled.

        Raises:
            Exception: that of a branch, if none completed.
        """


def require_sampling(sampling_params: Any, strategy: str) -> None:
    """Check that branches can differ.

    Raises:
        ParamsError: if decoding is greedy.
    """
    if sampling_params.temperature < GREEDY_TEMPERATURE:
        problem = f"got {sampling_params.temperature:g}; {strategy} needs a temperature above 0: all branches are alike"
        raise ParamsError("body.temperature", problem)
