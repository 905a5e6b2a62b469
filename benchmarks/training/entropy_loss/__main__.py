"""Peak memory of the mean token entropy and its gradient: written plainly, and by em_train's (TRL's) fused head.

    python -m benchmarks.training.entropy_loss --tokens 2048 --vocab 151936 --hidden 896

Each form runs in a process of its own; what is in memory before it (torch, hidden states, weights) is subtracted. Both
end with the gradients of the hidden states and of the head's weight, which the figures include.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from em_train.model import add_fused_head

FORMS = ("plain", "fused")


def measure(form: str, tokens: int, vocab: int, hidden: int) -> dict[str, float]:
    """Return the peak in GiB above the start, the seconds, the loss, and the norm of the weight's gradient."""
    torch.manual_seed(0)
    states = torch.randn(1, tokens + 1, hidden, requires_grad=True)
    head = torch.nn.Linear(hidden, vocab, bias=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    states, head = states.to(device).detach().requires_grad_(), head.to(device)
    began, before = time.monotonic(), _peak_gib(reset=True)
    if form == "plain":
        logp = head(states[:, :-1]).log_softmax(-1)
        loss = -(logp.exp() * logp).sum(-1).mean()
    else:
        loss = _fused_entropies(states, head).mean()
    loss.backward()
    assert head.weight.grad is not None
    norm = head.weight.grad.norm().item()
    return {"GiB": _peak_gib() - before, "seconds": time.monotonic() - began, "loss": loss.item(), "gradient": norm}


def _fused_entropies(states: torch.Tensor, head: torch.nn.Linear) -> torch.Tensor:
    """Run the head alone: a stand-in for the model's body returns the given hidden states [1, tokens, hidden]."""
    model: Any = torch.nn.Module()
    model.forward = lambda **_: None
    config = SimpleNamespace()
    model.config = SimpleNamespace(get_text_config=lambda: config)
    model.base_model = lambda **_: SimpleNamespace(last_hidden_state=states)
    model.get_output_embeddings = lambda: head
    add_fused_head(model)
    labels = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
    entropies: torch.Tensor = model.forward(labels=labels, fused_lm_head=True).entropy
    return entropies


def _peak_gib(reset: bool = False) -> float:
    """Return the peak memory of the device, or on the CPU of the process, since the last `reset`."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**30
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def main() -> None:
    """Measure each form in a new process and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("vocab", 151_936), ("hidden", 896)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--form", choices=FORMS, help="measure this one alone, in this process")
    options = parser.parse_args()
    sizes = (options.tokens, options.vocab, options.hidden)
    if options.form:
        print(json.dumps(measure(options.form, *sizes)))
        return
    logits_gib = options.tokens * options.vocab * 4 / 2**30
    print(f"{options.tokens} x {options.vocab} logits take {logits_gib:.2f} GiB in float32")
    for form in FORMS:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training.entropy_loss", "--form", form]
        flags = [f"--{name}={value}" for name, value in zip(("tokens", "vocab", "hidden"), sizes, strict=True)]
        done = subprocess.run([*command, *flags], check=True, capture_output=True, text=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        print(form, "  ".join(f"{name} {value:.5g}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
