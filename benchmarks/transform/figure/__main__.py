"""Draws the figure of docs/the-transform.md, how far EM-INF moves each logit: `python -m benchmarks.transform.figure`.

It shows the float64 reference on one random row with the shape of a language model's logits.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.transform.logits import language_model_logits
from em_sampler import EMInfParams
from em_sampler.transforms import reference

TARGET = Path("docs/figures/the-transform.png")
ROW, VOCAB = 7, 151_936  # a row with an entropy above 1 nat
STEPS = (1, 5, 15)


def main() -> None:
    """Draw the figure and save it."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    logits = language_model_logits(ROW + 1, VOCAB, origin="bfloat16")[ROW].double().numpy()
    values, counts = np.unique(logits, return_counts=True)
    p = reference.softmax(logits)
    cut = float((p * logits).sum())
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    above.bar(values - cut, counts, width=0.06, color="#7a8ca3")
    above.set(yscale="log", ylabel="logits of that value", title=f"{VOCAB:,} logits, {len(values):,} values")
    for steps in STEPS:
        moved, _ = reference.em_inf(logits, EMInfParams(threshold=0.0, steps=steps))
        order = np.argsort(logits)
        below.plot(
            logits[order] - cut,
            (moved - logits)[order],
            ".-",
            markersize=3,
            linewidth=0.8,
            label=f"{steps} step{'s' * (steps > 1)}",
        )
    below.axvline(0, color="#888888", linewidth=0.8)
    below.set(xlabel="distance from the cut, in nats: log p + H", ylabel="moved by, in nats")
    below.legend(frameon=False)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()
