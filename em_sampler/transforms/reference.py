"""The reference: every method for one row in float64, plain enough to check against its paper.

The faster implementations are tested against this file. Source of EM-INF and adaptive temperature: arXiv 2505.15134,
section 4 and appendix A; of the methods that remove tokens: see their params.
"""

import numpy as np
import numpy.typing as npt

from em_sampler.params import (
    AdaptiveTemperatureParams,
    EMInfParams,
    GreedyBelowParams,
    PLessParams,
    TopHParams,
    TruncationParams,
)

Row = npt.NDArray[np.float64]  # [vocab]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam as published, as in the released code


def softmax(logits: Row) -> Row:
    """Return the probabilities of a row of logits; -inf has probability 0."""
    weights = np.exp(logits - logits.max())
    p: Row = weights / weights.sum()
    return p


def entropy(logits: Row) -> float:
    """Return the entropy in nats of softmax(logits), with 0 log 0 = 0."""
    p = softmax(logits)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def varentropy(logits: Row) -> float:
    """Return the variance of log p, in nats squared, under p = softmax(logits)."""
    p = softmax(logits)
    p = p[p > 0]
    log_p = np.log(p)
    return float((p * log_p**2).sum() - (p * log_p).sum() ** 2)


def gradient(logits: Row, p0: Row, kl_weight: float) -> Row:
    """Return the gradient of H(p) + kl_weight * KL(p0 || p) with respect to the logits of p."""
    p = softmax(logits)
    log_p = np.log(p, where=p > 0, out=np.zeros_like(p))
    return -p * (log_p + entropy(logits)) + kl_weight * (p - p0)


def em_inf(logits: Row, params: EMInfParams) -> tuple[Row, int]:
    """Return the row after EM-INF and the number of steps taken. -inf stays -inf."""
    z = logits.astype(np.float64)
    p0 = softmax(z)
    m, v = np.zeros_like(z), np.zeros_like(z)
    for step in range(params.steps):
        if entropy(z) < params.threshold:
            return z, step
        g = gradient(z, p0, params.kl_weight)
        if params.optimizer == "sgd":
            z = z - params.learning_rate * g
            continue
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g**2
        m_hat = m / (1 - BETA1 ** (step + 1))
        v_hat = v / (1 - BETA2 ** (step + 1))
        z = z - params.learning_rate * m_hat / (np.sqrt(v_hat) + EPSILON)
    return z, params.steps


def temperature(logits: Row, params: AdaptiveTemperatureParams) -> float:
    """Return the largest T in the range with H(softmax(logits / T)) <= max(ratio * H, threshold).

    A row whose entropy H does not exceed the threshold is left alone: T = 1. If no T in the range is low enough, the
    lowest one is returned.
    """
    z = logits.astype(np.float64)
    h = entropy(z)
    low, high = params.min_temperature, params.max_temperature
    if h <= params.threshold:
        return 1.0
    target = max(params.ratio * h, params.threshold)
    if entropy(z / high) <= target:
        return high
    while high / low > 1 + 1e-12:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropy(z / middle) <= target else (low, middle)
    return low


def kept(logits: Row, params: TruncationParams, request_temperature: float) -> npt.NDArray[np.bool_]:
    """Return which tokens a method keeps [vocab]. Tokens as likely as the least likely of these stay, and the top."""
    z = logits.astype(np.float64)
    words = np.isfinite(z)
    p = softmax(z / request_temperature)
    if isinstance(params, PLessParams):
        bound = (p**2).sum()
        if params.normalized:
            bound = (words.sum() * bound - 1) / max(words.sum() - 1, 1)
    elif isinstance(params, TopHParams):
        bound = _lowest_of_prefix(p, params.alpha)
    elif isinstance(params, GreedyBelowParams):
        bound = p.max() if p.max() < params.p_max else 0.0
    else:
        return np.asarray(words & (z >= z.max() - params.n * z[words].std()))
    return np.asarray(words & ((p >= bound) | (z == z.max())))


def _lowest_of_prefix(p: Row, alpha: float) -> float:
    """Return the lowest probability in the longest prefix of the sorted p whose entropy is at most alpha * H.

    The prefix has probability 1. Its entropy rises with each token: this one is no likelier than those before it.
    """
    descending = -np.sort(-p)
    log_p = np.log(descending, where=descending > 0, out=np.zeros_like(descending))
    total = np.cumsum(descending)
    entropies = np.log(total) - np.cumsum(descending * log_p) / total
    length = max(int((entropies <= alpha * entropies[-1]).sum()), 1)
    return float(descending[length - 1])
