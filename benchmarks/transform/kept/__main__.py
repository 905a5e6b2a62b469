"""Draws the figures of docs/methods.md, what each method makes of a real row of logits.

`python -m benchmarks.transform.kept build/models/SmolLM2-135M-Instruct` (from `make models`) writes
docs/figures/method-*.svg. It shows the float64 reference, with each method's default params, at temperature 1.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_sampler.params import (
    METHODS,
    AdaptiveTemperatureParams,
    EMInfParams,
    MeasureParams,
    Params,
    PLessParams,
    TopHParams,
    TopNSigmaParams,
)
from em_sampler.transforms import reference
from em_sampler.transforms.reference import Row

TARGET = Path("docs/figures")
PROMPT = "She poured herself a cup of"  # after which SmolLM2 135M has an entropy of 3.5 nats
SHOWN = 30  # tokens
BEFORE, AFTER, BOUND = "#9aa5b1", "#0b7a75", "#c9772b"


class Drawing(NamedTuple):
    """What a method makes of a row."""

    after: Row  # probabilities [vocab]
    bound: float  # a probability before the method: what separates the tokens
    meaning: str  # of the bound


def draw(z: Row, params: Params) -> Drawing:
    """Apply a method to a row of logits."""
    p, h = reference.softmax(z), reference.entropy(z)
    if isinstance(params, EMInfParams):
        moved, steps = reference.em_inf(z, params)
        return Drawing(
            reference.softmax(moved), np.exp(-h), f"exp(-H): the first of {steps} steps raises what is above it"
        )
    if isinstance(params, AdaptiveTemperatureParams):
        t = reference.temperature(z, params)
        unchanged = (p ** (1 / t)).sum() ** (t / (1 - t))
        return Drawing(reference.softmax(z / t), unchanged, f"what is above rises, the rest falls, temperature {t:.2f}")
    assert not isinstance(params, MeasureParams)
    kept = reference.kept(z, params, 1.0)
    if isinstance(params, PLessParams):
        bound, meaning = (p**2).sum(), "the sum of all p²"
    elif isinstance(params, TopNSigmaParams):
        bound, meaning = (
            p.max() * np.exp(-params.n * z.std()),
            f"n = {params.n:g} times the standard deviation below the peak",
        )
    elif isinstance(params, TopHParams):
        bound, meaning = (
            p[kept].min(),
            f"with one token more, the entropy is above {params.alpha:g} H = {params.alpha * h:.2f}",
        )
    else:
        bound, meaning = params.p_max, "p_max: no token reaches it, so only the likeliest stays"
    return Drawing(reference.softmax(np.where(kept, z, -np.inf)), bound, meaning)


def save(p: Row, drawing: Drawing, tokens: Sequence[str], method: str, target: Path) -> None:
    """Save the figure of a method: the likeliest tokens before and after, on a logarithmic axis."""
    order = np.argsort(-p, kind="stable")[:SHOWN]
    before, after = p[order], drawing.after[order]
    places, kept, floor = np.arange(SHOWN), after > 0, before.min() / 4
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.bar(places, before, color=BEFORE, width=0.8, label="before")
    axes.bar(places[kept], after[kept], color=AFTER, width=0.4, label="after")
    axes.axhline(drawing.bound, color=BOUND, linewidth=1, label=drawing.meaning)
    axes.set(yscale="log", ylim=(floor, 1.2), xlim=(-0.7, SHOWN - 0.3), ylabel="probability")
    axes.set_xticks(places, [tokens[token] for token in order], rotation=60, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", labelsize=8, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    entropies = [abs(float((each[each > 0] * np.log(each[each > 0])).sum())) for each in (p, drawing.after)]
    axes.set_title(f"{method}: entropy {entropies[0]:.2f} nats before, {entropies[1]:.2f} after", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=3)
    figure.savefig(target / f"method-{method}.svg", metadata={"Date": None})


def row_of(folder: Path, prompt: str) -> tuple[Row, list[str]]:
    """Return a model's logits for the token after the prompt, and the text of every token."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    return logits.double().numpy(), [tokenizer.decode([token]).strip() or "␣" for token in range(len(logits))]


def main() -> None:
    """Draw the figures and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a model, such as build/models/SmolLM2-135M-Instruct")
    parser.add_argument("--prompt", default=PROMPT, help=f"text before the token ({PROMPT})")
    parser.add_argument("--out", default=TARGET, type=Path, help=f"folder to write to ({TARGET})")
    args = parser.parse_args()
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "em"}  # text as text; the same file every time
    z, tokens = row_of(args.model, args.prompt)
    for method, params in METHODS.items():
        if method != "none":
            save(reference.softmax(z), draw(z, params()), tokens, method, args.out)


if __name__ == "__main__":
    main()
