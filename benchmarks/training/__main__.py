"""EM-FT, EM-RL and a labelled baseline on the demo model, before and after training, with and without EM-INF.

    python -m benchmarks.training --out build/training

Trains by `em-train`, two runs at a time, on chains of six operators; only the labelled baseline sees their answers.
Tests on held-out chains, which the model has never seen, and prints one table.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import demo
from benchmarks.intervals import t_interval
from benchmarks.training.configs import (
    CONFIGS,
    DEV_SEED,
    SEEDS,
    SWEEP_LEARNING_RATES,
    TEST_PROBLEMS,
    TEST_SEED,
    UNTRAINED,
)
from benchmarks.training.evaluate import DECODINGS, Evaluation, evaluate
from benchmarks.training.train import train, write_prompts
from demo.problems import problems

Evaluations = dict[str, dict[str, list[Evaluation]]]  # by config and decoding, one for each seed


def main() -> None:
    """Train, test, print the table and write results.json; with --sweep compare learning rates instead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/training"))
    parser.add_argument(
        "--sweep", action="store_true", help="only compare learning rates, as they were chosen; longer than the rest"
    )
    options = parser.parse_args()
    began = time.monotonic()
    data = write_prompts(options.out / "prompts.jsonl")
    if options.sweep:
        sweep(options.out, data)
        return
    folders = train_all(options.out, data)
    print(f"trained after {time.monotonic() - began:.0f} s", flush=True)
    evaluations = evaluate_all(folders)
    rows = {name: {key: [asdict(one) for one in ones] for key, ones in by.items()} for name, by in evaluations.items()}
    (options.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(evaluations))
    for name in CONFIGS:
        for seed in SEEDS:
            report = json.loads((folders[name][seed] / "run.json").read_text())
            print(f"{name + '-' + str(seed):12} {report['ended']}; kept: step {report['kept_step']}")
    print(f"{time.monotonic() - began:.0f} seconds")


def train_all(out: Path, data: Path) -> dict[str, list[Path]]:
    """Return the model folder of every seed, by config; the untrained model is among them."""
    runs = [(name, seed) for name in CONFIGS for seed in SEEDS]
    folders = {UNTRAINED: [demo.MODEL_PATH] * len(SEEDS)} | {name: [] for name in CONFIGS}
    with ThreadPoolExecutor(2) as pool:
        trained = pool.map(lambda run: train(CONFIGS[run[0]], run[1], out / f"{run[0]}-{run[1]}", data), runs)
        for (name, _), folder in zip(runs, trained, strict=True):
            folders[name].append(folder)
    return folders


def evaluate_all(folders: dict[str, list[Path]]) -> Evaluations:
    """Evaluate every model under every decoding, two at a time."""
    test_problems = problems("held_out", TEST_PROBLEMS, TEST_SEED)
    evaluations: Evaluations = {}
    with ProcessPoolExecutor(2) as pool:
        jobs = {
            (name, decoding, seed): pool.submit(evaluate, folders[name][seed], decoding, seed, test_problems)
            for name in folders
            for decoding in DECODINGS
            for seed in SEEDS
        }
        for (name, decoding, _), job in jobs.items():
            evaluations.setdefault(name, {}).setdefault(decoding, []).append(job.result())
    return evaluations


def table(evaluations: Evaluations) -> str:
    """Return a markdown table with a row for each config: means over the seeds, with their 95 % t-intervals."""
    head = ["", "temperature 1", "greedy", "EM-INF", "entropy, nats", "tokens"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, by_decoding in evaluations.items():
        cells = [CONFIGS[name].title if name in CONFIGS else name]
        columns = [[one.accuracy for one in by_decoding[decoding]] for decoding in DECODINGS]
        columns += [[getattr(one, field) for one in by_decoding["sampled"]] for field in ("entropy", "length")]
        for values, form in zip(columns, ("{:.3f}",) * 3 + ("{:.4f}", "{:.1f}"), strict=True):
            mean, half = t_interval(values)
            cells.append(f"{form.format(mean)} ± {form.format(half)}" if half > 1e-9 else form.format(mean))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sweep(out: Path, data: Path) -> None:
    """Train with several learning rates; print accuracies on problems that are neither for training nor for tests."""
    dev_problems = problems("held_out", TEST_PROBLEMS, DEV_SEED)
    runs = {
        (name, rate): replace(config, flags=config.flags | {"learning_rate": rate})
        for name, config in CONFIGS.items()
        for rate in SWEEP_LEARNING_RATES
    }
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda key: train(runs[key], 100, out / "sweep" / f"{key[0]}-{key[1]:g}", data), runs))
    trained = {f"{name} {rate:g}": folder for (name, rate), folder in zip(runs, folders, strict=True)}
    for name, folder in {UNTRAINED: demo.MODEL_PATH, **trained}.items():
        sampled, greedy = (evaluate(folder, decoding, 100, dev_problems) for decoding in ("sampled", "greedy"))
        print(f"{name:15} temperature 1 {sampled.accuracy:.3f}  greedy {greedy.accuracy:.3f}", flush=True)


if __name__ == "__main__":
    main()
