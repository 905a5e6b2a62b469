"""The implementations that the benchmark of the transform compares, by name.

Each one prepares a case (allocates, compiles, packs parameters) and returns what is timed: a call on the case's logits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.transform.cases import Case
from em_sampler.params import EMInfParams, TopHParams
from em_sampler.transforms.batch import BatchParams, Column
from em_sampler.transforms.eager import EagerTransform
from em_sampler.transforms.reference import BETA1, BETA2, EPSILON

Call = Callable[[Tensor], object]  # on logits [rows, vocab] float32, which it may change
Steps = Callable[..., tuple[Tensor, Tensor, Tensor]]

STEPS_PER_GRAPH = 5  # torch.compile unrolls them; 64 would take minutes


def ours(case: Case, device: torch.device) -> Call:
    """Prepare the fastest implementation that em_sampler has for the device. On CUDA it must not be the eager one.

    Raises:
        RuntimeError: on CUDA, if the kernels do not work: the time would be that of `eager`. With the cause.
    """
    from em_sampler.transforms.dispatch import build_transform

    transform = build_transform(case.vocab, device, case.rows)
    if device.type == "cuda" and isinstance(transform, EagerTransform):
        raise RuntimeError(f"the fused form did not build: {_why_not_built(case, device)}")
    batch_params = _batch_params(case, device)
    return lambda logits: transform(logits, batch_params)


def _batch_params(case: Case, device: torch.device) -> BatchParams:
    return BatchParams.of(case.params(), device, [case.temperature] * case.rows)


def _why_not_built(case: Case, device: torch.device) -> str:
    """Return on one line what the kernels' own constructor raises, which `build_transform` only logs."""
    try:
        from em_sampler.transforms.triton_cuda import TritonTransform

        TritonTransform(case.vocab, device, case.rows)
    except Exception as error:  # whatever a compiler may raise
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "unknown, for it builds on its own"


def eager(case: Case, device: torch.device) -> Call:
    """Prepare em_sampler's eager torch, which passes over memory once for each operation."""
    transform = EagerTransform(case.vocab, device, case.rows)
    batch_params = _batch_params(case, device)
    return lambda logits: transform(logits, batch_params)


def compiled(case: Case, device: torch.device) -> Call:
    """Prepare EM-INF's descent as plain torch, fused by torch.compile for the shape of the case."""
    torch._dynamo.reset()  # after eight shapes of one function it would fall back to eager without a warning
    return descent(case, device, torch.compile(adam_steps, dynamic=False))


def released(case: Case, device: torch.device) -> Call:
    """Prepare the released method, called row by row, as each row has its own parameters."""
    from benchmarks.released_method import released_method

    params = [p for p in case.params() if isinstance(p, EMInfParams)]

    def call(logits: Tensor) -> None:
        for row, row_params in enumerate(params):
            released_method(logits[row : row + 1], row_params)

    return call


def transformers(case: Case, device: torch.device) -> Call:
    """Prepare the logits processor of `transformers`: of the methods that remove tokens it has top_h, nearly."""
    from transformers.generation.logits_process import TopHLogitsWarper

    process, input_ids = TopHLogitsWarper(TopHParams().alpha), torch.empty(case.rows, 0, dtype=torch.long)
    return lambda logits: process(input_ids, logits)  # type: ignore[arg-type]


IMPLEMENTATIONS: dict[str, Callable[[Case, torch.device], Call]] = {
    "ours": ours,
    "compiled": compiled,
    "eager": eager,
    "released": released,
    "transformers": transformers,
}


def supports(implementation: str, case: Case) -> bool:
    """Return whether it has the case's method: `released` and `compiled` have EM-INF alone, `transformers` top_h."""
    supported = {"compiled": ("adam",), "released": ("adam", "sgd"), "transformers": ("top_h",)}
    return implementation not in supported or case.method in supported[implementation]


def descent(case: Case, device: torch.device, take_steps: Steps) -> Call:
    """Prepare Adam's steps on a batch, a few in each call of `take_steps`; a row stops below its threshold.

    It always takes all of a case's steps: to ask whether any row is left would make the host wait for the device.
    """
    params = BatchParams.of(case.params(), device)
    columns = params[Column.THRESHOLD], params[Column.LEARNING_RATE], params[Column.KL_WEIGHT]
    powers = [[1 - BETA1**t, 1 - BETA2**t] for t in range(1, case.steps + 1)]
    corrections = torch.tensor(powers, dtype=torch.float32, device=device)  # from the host, every step would wait

    @torch.no_grad()
    def call(logits: Tensor) -> Tensor:
        z, p0 = logits, torch.softmax(logits, -1)
        m, v = torch.zeros_like(z), torch.zeros_like(z)
        for part in torch.split(corrections, STEPS_PER_GRAPH):
            z, m, v = take_steps(z, m, v, p0, *columns, part)
        return logits.copy_(z)

    return call


def adam_steps(
    z: Tensor, m: Tensor, v: Tensor, p0: Tensor, threshold: Tensor, rate: Tensor, kl_weight: Tensor, corrections: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take some steps of `descent`; return logits, first and second moments [rows, vocab] after these steps.

    Args:
        z: logits [rows, vocab].
        m: first moments [rows, vocab].
        v: second moments [rows, vocab].
        p0: probabilities before the first step [rows, vocab].
        threshold: [rows, 1], in nats.
        rate: learning rate [rows, 1].
        kl_weight: [rows, 1].
        corrections: [steps, 2], Adam's bias corrections.
    """
    for step in range(corrections.shape[0]):
        log_p = torch.log_softmax(z, -1)
        p = log_p.exp()
        h = -(p * log_p).sum(-1, keepdim=True)
        g = kl_weight * (p - p0) - p * (log_p + h)
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g * g
        moved = z - rate * (m / corrections[step, 0]) / ((v / corrections[step, 1]).sqrt() + EPSILON)
        z = torch.where(h >= threshold, moved, z)
    return z, m, v
