"""EM-FT, EM-RL and the labelled reference on the demo model, before and after, with EM-INF on each: one table.

    python -m benchmarks.training --out build/training

Trains by `em-train`, two runs at a time, on chains of six operators whose answers only the labelled arm sees; tests on
held-out ones, which the model has never seen.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import demo
from demo.problems import Problem, check, problems, stream

SEEDS = (0, 1, 2)
TRAIN_SEED, TEST_SEED, DEV_SEED = 815_134, 250_515_134, 4_711  # of problems; TEST_SEED is demo/evaluate.py's
PROMPTS, TESTED, SAMPLES = 4096, 500, 4
STEPS, BATCH, CHECK = 40, 128, 10
NEW_TOKENS = 128
RATES = (1e-5, 3e-5, 1e-4, 3e-4)  # of --sweep
T_95 = 4.303  # Student's t for three seeds
SHARED = {"model": demo.MODEL_PATH, "max_tokens": NEW_TOKENS, "steps": STEPS, "batch_size": BATCH, "eval_every": CHECK}
SHARED |= {"micro_batch_size": 32, "eval_prompts": 64}


@dataclass(frozen=True)
class Arm:
    """A way to train: what the command is given beyond SHARED."""

    title: str
    command: str
    flags: dict[str, Any]


# The rates are the best of RATES on other problems at temperature 1 (--sweep; the token reward does as well at 1e-5): a
# model of 1.6 million parameters does not move at the published 1e-6 in 40 steps.
ARMS = {
    "ft": Arm("EM-FT", "ft", {"fresh_every": 1, "learning_rate": 1e-4}),
    "token": Arm("EM-RL, token", "rl", {"reward": "token", "learning_rate": 3e-5}),
    "sequence": Arm("EM-RL, sequence", "rl", {"reward": "sequence", "learning_rate": 3e-5}),
    "correct": Arm("RLOO, labels", "rl", {"reward": "correct", "learning_rate": 1e-4}),
}
UNTRAINED = "untrained"
DECODING = ("sampled", "greedy", "em_inf")


@dataclass(frozen=True)
class Tested:
    """One model under one decoding: means over problems and samples; entropy in nats a token, of the model itself."""

    accuracy: float
    entropy: float
    length: float


# ---- Training


def train(arm: Arm, seed: int, out: Path, data: Path) -> Path:
    """The folder of a finished run; a finished one is not made again."""
    if (out / "model.safetensors").is_file():
        return out
    flags = SHARED | arm.flags | {"seed": seed, "prompts": data, "out": out}
    command = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    log = out.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, "-m", "em_train.cli", arm.command, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            check=True,
        )
    return out


def write_prompts(path: Path) -> Path:
    """Chains of six operators that are no test problems (the splits share no question)."""
    chains = (problem for problem in stream("train", TRAIN_SEED) if operators(problem) == 6)
    rows = [{"prompt": p.question, "answer": str(p.answer)} for p in islice(chains, PROMPTS)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def operators(problem: Problem) -> int:
    """How many a chain has."""
    return sum(problem.question.count(sign) for sign in "+-*")


# ---- Testing


def tested(model: Path, decoding: str, seed: int, asked: Sequence[Problem]) -> Tested:
    """`asked` answered by the model in a process of its own; sampled ones SAMPLES times each, at temperature 1."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from em_sampler.huggingface import EntropyMinimizer
    from em_sampler.params import EMInfParams
    from em_train import outputs
    from em_train.prompts import Prompt

    torch.set_num_threads(1)
    torch.manual_seed(1000 + seed)  # none of those that training uses
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    outputs.fuse(loaded)
    drawing: Any = loaded
    if decoding == "em_inf":
        drawing = _Processed(loaded, [EntropyMinimizer(EMInfParams())])
    asked = list(asked) * (1 if decoding == "greedy" else SAMPLES)
    prompts = [outputs.encode(tokenizer, Prompt(problem.question)) for problem in asked]
    temperature = 0.0 if decoding == "greedy" else 1.0
    ends = outputs.end_tokens(loaded, tokenizer)
    drawn = outputs.draw(drawing, prompts, tokenizer.pad_token_id, ends, NEW_TOKENS, temperature, rows=256)
    scored = outputs.score(loaded, list(zip(prompts, drawn, strict=True)), tokenizer.pad_token_id, rows=64)
    replies = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    tokens = sum(len(output.token_ids) for output in scored)
    return Tested(
        accuracy=sum(map(check, asked, replies)) / len(asked),
        entropy=sum(sum(output.entropies) for output in scored) / tokens,
        length=tokens / len(asked),
    )


class _Processed:
    """A model whose `generate` has logits processors."""

    def __init__(self, model: Any, processors: list[Any]) -> None:
        self.device = model.device
        self._model, self._processors = model, processors

    def generate(self, **how: Any) -> Any:
        return self._model.generate(**how, logits_processor=self._processors)


# ---- The table


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % t-interval over the seeds."""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, T_95 * deviation / math.sqrt(len(values))


def table(found: dict[str, dict[str, list[Tested]]]) -> str:
    """Markdown: an arm a row."""
    head = ["", "temperature 1", "greedy", "EM-INF", "entropy, nats", "tokens"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, by_decoding in found.items():
        cells = [ARMS[name].title if name in ARMS else name]
        columns = [[one.accuracy for one in by_decoding[decoding]] for decoding in DECODING]
        columns += [[getattr(one, field) for one in by_decoding["sampled"]] for field in ("entropy", "length")]
        for values, form in zip(columns, ("{:.3f}",) * 3 + ("{:.4f}", "{:.1f}"), strict=True):
            mean, half = interval(values)
            cells.append(f"{form.format(mean)} ± {form.format(half)}" if half > 1e-9 else form.format(mean))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sweep(out: Path, data: Path) -> None:
    """Accuracy at temperature 1 and greedy after training at several rates, on problems of neither train nor test."""
    asked = problems("held_out", TESTED, DEV_SEED)
    runs = {
        (name, rate): Arm(arm.title, arm.command, arm.flags | {"learning_rate": rate})
        for name, arm in ARMS.items()
        for rate in RATES
    }
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda key: train(runs[key], 100, out / "sweep" / f"{key[0]}-{key[1]:g}", data), runs))
    tuned = {f"{name} {rate:g}": folder for (name, rate), folder in zip(runs, folders, strict=True)}
    for name, folder in {UNTRAINED: demo.MODEL_PATH, **tuned}.items():
        sampled, greedy = (tested(folder, decoding, 100, asked) for decoding in ("sampled", "greedy"))
        print(f"{name:15} temperature 1 {sampled.accuracy:.3f}  greedy {greedy.accuracy:.3f}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/training"))
    parser.add_argument("--sweep", action="store_true", help="how the learning rates were chosen; longer than the rest")
    options = parser.parse_args()
    began = time.monotonic()
    data = write_prompts(options.out / "prompts.jsonl")
    if options.sweep:
        sweep(options.out, data)
        return
    runs = [(name, seed) for name in ARMS for seed in SEEDS]
    with ThreadPoolExecutor(2) as pool:
        folders = pool.map(lambda run: train(ARMS[run[0]], run[1], options.out / f"{run[0]}-{run[1]}", data), runs)
        models = {UNTRAINED: [demo.MODEL_PATH] * len(SEEDS)} | {name: [] for name in ARMS}
        for (name, _), folder in zip(runs, folders, strict=True):
            models[name].append(folder)
    print(f"trained after {time.monotonic() - began:.0f} s", flush=True)
    asked = problems("held_out", TESTED, TEST_SEED)
    found: dict[str, dict[str, list[Tested]]] = {}
    with ProcessPoolExecutor(2) as pool:
        jobs = {
            (name, decoding, seed): pool.submit(tested, models[name][seed], decoding, seed, asked)
            for name in models
            for decoding in DECODING
            for seed in SEEDS
        }
        for (name, decoding, _), job in jobs.items():
            found.setdefault(name, {}).setdefault(decoding, []).append(job.result())
    ended = {f"{name}-{seed}": json.loads((models[name][seed] / "run.json").read_text()) for name, seed in runs}
    rows = {name: {key: [asdict(one) for one in ones] for key, ones in by.items()} for name, by in found.items()}
    (options.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(found))
    for run, card in ended.items():
        print(f"{run:12} {card['ended']}; kept: step {card['kept_step']}")
    print(f"{time.monotonic() - began:.0f} seconds")


if __name__ == "__main__":
    main()
