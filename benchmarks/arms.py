"""The implementations that the benchmark of the transform holds against each other, by name.

An arm prepares a case (allocates, compiles, packs parameters) and returns what is timed: a call on the case's logits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case
from em_sampler.params import EMInfParams
from em_sampler.transforms.batch import BatchParams
from em_sampler.transforms.eager import EagerTransform
from em_sampler.transforms.reference import BETA1, BETA2, EPSILON

Call = Callable[[Tensor], object]  # on logits [rows, vocab] float32, which it may change
Steps = Callable[..., tuple[Tensor, Tensor, Tensor]]

STEPS_IN_A_GRAPH = 5  # torch.compile unrolls them; 64 would take it minutes


def ours(case: Case, device: torch.device) -> Call:
    """The fastest form that em_sampler has for the device."""
    from em_sampler.transforms.dispatch import build_transform

    engine = build_transform(case.vocab, device, case.rows)
    packed = BatchParams.of(case.params(), device)
    return lambda logits: engine(logits, packed)


def eager(case: Case, device: torch.device) -> Call:
    """The reference for batches, a pass over memory for each operation."""
    engine = EagerTransform(case.vocab, device, case.rows)
    packed = BatchParams.of(case.params(), device)
    return lambda logits: engine(logits, packed)


def compiled(case: Case, device: torch.device) -> Call:
    """EM-INF's descent as plain torch, for torch.compile to fuse, compiled for the shape of the case."""
    torch._dynamo.reset()  # past eight shapes of one function it would fall back to eager, without a word
    return descent(case, device, torch.compile(adam_steps, dynamic=False))


def released(case: Case, device: torch.device) -> Call:
    """The released method; parameters of its own for each row, as a loop over rows makes easy."""
    from benchmarks.released import released as released_rows

    params = [p for p in case.params() if isinstance(p, EMInfParams)]

    def call(logits: Tensor) -> None:
        for number, row_params in enumerate(params):
            released_rows(logits[number : number + 1], row_params)

    return call


ARMS: dict[str, Callable[[Case, torch.device], Call]] = {
    "ours": ours,
    "compiled": compiled,
    "eager": eager,
    "released": released,
}


def applies(arm: str, case: Case) -> bool:
    """Whether the arm knows the case's method: `released` has EM-INF alone, `compiled` EM-INF with adam."""
    known = {"compiled": ("adam",), "released": ("adam", "sgd")}
    return arm not in known or case.method in known[arm]


def descent(case: Case, device: torch.device, take_steps: Steps) -> Call:
    """Adam's steps on a whole batch, a few in each call of `take_steps`; a row stops below its threshold.

    Always all of a case's steps, since to ask whether any row is left would wait for the device.
    """
    packed = BatchParams.of(case.params(), device)
    rows = packed["threshold"], packed["learning_rate"], packed["kl_weight"]
    powers = [[1 - BETA1**t, 1 - BETA2**t] for t in range(1, case.steps + 1)]
    corrections = torch.tensor(powers, dtype=torch.float32, device=device)  # on the device, or each step would wait

    @torch.no_grad()
    def call(logits: Tensor) -> Tensor:
        z, p0 = logits, torch.softmax(logits, -1)
        m, v = torch.zeros_like(z), torch.zeros_like(z)
        for some in torch.split(corrections, STEPS_IN_A_GRAPH):
            z, m, v = take_steps(z, m, v, p0, *rows, some)
        return logits.copy_(z)

    return call


def adam_steps(
    z: Tensor, m: Tensor, v: Tensor, p0: Tensor, threshold: Tensor, rate: Tensor, kl_weight: Tensor, corrections: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Some steps of `descent`: logits, first and second moments [rows, vocab] after those passed in.

    Args:
        threshold, rate, kl_weight: [rows, 1].
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
