"""What every strategy is: a frozen pydantic model, whose fields are what a request may set, with one method to run."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from em_sampler.validation import ParamsError
from server.strategies.branches import Branch, Branches

MIN_BRANCHES = 2
MAX_BRANCHES = 64  # of one request, where the operator says nothing else


class Strategy(BaseModel, ABC):
    """Test-time scaling: several engine requests for one HTTP request, of which one becomes the reply."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    type: str
    limit_field: ClassVar[str]  # the field that says how many branches there may be: capped by the operator

    @property
    def branches(self) -> int:
        """How many engine requests it may make."""
        count: int = getattr(self, self.limit_field)
        return count

    @property
    def max_parallel(self) -> int:
        """How many of them at a time."""
        return self.branches

    @property
    def top_logprobs(self) -> int:
        """Top log-probabilities that make a token's confidence; 0 where nobody asks for it."""
        return 0

    def summary_fields(self) -> dict[str, Any]:
        """What the response repeats of the request."""
        return {"type": self.type, self.limit_field: self.branches}

    def check(self, sampling_params: Any, max_logprobs: int) -> None:
        """Raises ParamsError for a request it cannot work with. `max_logprobs`: the server's limit, -1 for none."""

    def keep_going(self, branches: Branches, branch: Branch) -> bool:
        """Whether a branch should go on, after each of its tokens."""
        return True

    @abstractmethod
    async def run(self, branches: Branches) -> Branch:
        """Start branches and follow them; the one that becomes the reply. Whatever runs then is ended."""


def require_sampling(sampling_params: Any, strategy: str) -> None:
    """Raises ParamsError where all branches would be the same."""
    if sampling_params.temperature < 1e-5:  # vLLM's own line between greedy and not
        problem = f"got {sampling_params.temperature:g}; {strategy} needs a temperature above 0: all branches are alike"
        raise ParamsError("body.temperature", problem)
