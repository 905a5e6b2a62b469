"""The base class of strategies: a frozen pydantic model whose fields a request may set, with one method to run."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from em_sampler.validation import ParamsError
from server.strategies.branches import Branch, Branches, EngineRequest

MIN_BRANCHES = 2
MAX_BRANCHES = 64  # of one request, unless the operator sets --strategy-max-branches
GREEDY_TEMPERATURE = 1e-5  # vLLM samples greedily below it: _SAMPLING_EPS in vllm/sampling_params.py
ONE_TOKEN_TOP_P = 1e-6  # the likeliest token of any vocabulary alone has more: 1 / size at least


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

    def check(self, engine_request: EngineRequest) -> None:
        """Check that the strategy can work with the engine request.

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
        ParamsError: if each token can only be the likeliest one.
    """
    one_token = {
        "temperature": (sampling_params.temperature < GREEDY_TEMPERATURE, "a temperature above 0"),
        "top_k": (sampling_params.top_k == 1, "2 or more, or 0 for all tokens"),
        "top_p": (sampling_params.top_p <= ONE_TOKEN_TOP_P, f"a value above {ONE_TOKEN_TOP_P:g}"),
        "min_p": (sampling_params.min_p >= 1, "a value below 1"),
    }
    for field, (is_so, needed) in one_token.items():
        if is_so:
            problem = f"got {getattr(sampling_params, field):g}; {strategy} needs {needed}: all branches are alike"
            raise ParamsError(f"body.{field}", problem)
