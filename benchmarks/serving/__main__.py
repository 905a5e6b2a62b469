"""What EM-INF costs a server, and what the plugin costs one that does not use it: output tokens per second, by arm.

`.venv/bin/python -m benchmarks.serving --model demo`. Arms take turns within each round, plain vLLM in a server beside
em-serve, both started several times; a ratio is of two arms of one round. Then the released way, one prompt at a time
(benchmarks/generate.py).
"""

import argparse
import asyncio
import csv
import os
import random
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import httpx

import demo
from benchmarks import dummy
from benchmarks.launch import EM_SERVE, PLAIN_VLLM, Bystanders, Server, busy_cores, serve
from benchmarks.load import client, turn
from benchmarks.ratios import interval, paired, spread
from demo.problems import problems
from demo.tokenizer import VOCABULARY
from demo.tokenizer import turn as chat_turn
from server.cli import DEMO_FLAGS


@dataclass(frozen=True)
class Setting:
    """How a model is served and what is expected of it: `target` is of on / off."""

    concurrency: tuple[int, ...]
    target: float
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """`base` names the arm that it is compared with."""

    em_inf: dict[str, Any] | None
    base: str | None
    plain: bool = False


MODELS = {
    "demo": Setting((1, 16, 64), 0.95),
    # A request with a seed ends vLLM 0.32 on the CPU where prompts are prefilled in chunks (docs/findings/upstream.md).
    "vocab151k": Setting((1, 16, 64), 0.95, ("--enforce-eager", "--no-enable-chunked-prefill")),
    "0.5b": Setting((1, 16, 64), 0.95, ("--enforce-eager", "--no-enable-chunked-prefill")),
    "7b": Setting((64,), 0.98, ("--gpu-memory-utilization", "0.4")),  # two servers share the device
}
DUMMY_FLAGS = ("--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "1024")

SETTLE = 1.5  # seconds before a turn: a worker of its own process spins for a second after its last step

PLAIN, OFF, ON = "plain vLLM", "off", "on"
ARMS = {
    PLAIN: Arm(None, None, plain=True),
    OFF: Arm(None, PLAIN),
    ON: Arm({"threshold": 0.3}, OFF),
    "all optimised": Arm({"threshold": 0.0}, OFF),
    "below threshold": Arm({"threshold": 20.0}, OFF),  # measured, and left alone
}


@dataclass(frozen=True)
class Turn:
    """One arm's turn; round -1 warms up, and has `optimised`: the share of tokens that took a step."""

    concurrency: int
    round: int
    arm: str
    rate: float  # output tokens per second
    start: int = 0  # of the servers
    others: float = 0.0  # cores that the rest of the machine kept busy
    optimised: float | None = None


def servers(stack: ExitStack, args: argparse.Namespace, folder: Path, start: int = 0) -> dict[bool, Server]:
    """Both servers, by whether they are plain. One after the other: on CUDA each measures the memory that is free.
    Who comes first alternates with `start`.
    """
    model, flags = args.model, ("--max-num-seqs", str(max(args.concurrency)), *MODELS[args.model].flags)
    if model == "demo":
        ours, theirs = flags, (str(demo.MODEL_PATH), *DEMO_FLAGS, *flags)
    else:
        ours = theirs = (str(folder), "--served-model-name", model, *DUMMY_FLAGS, *flags)
    both = {
        False: serve(*EM_SERVE, *ours, log=args.out / "em-serve.log", executor=args.executor),
        True: serve(*PLAIN_VLLM, *theirs, log=args.out / "plain-vllm.log", executor=args.executor),
    }
    running = {plain: stack.enter_context(both[plain]) for plain in sorted(both, reverse=start % 2 == 1)}
    for plain, server in running.items():
        _check_plugin(server, model, plain)
    return running


def _check_plugin(server: Server, model: str, plain: bool) -> None:
    """Settings that cannot be used are refused by the plugin, and mean nothing to a vLLM that has none."""
    body = {"model": model, "prompt": [1], "max_tokens": 1, "vllm_xargs": {"em_inf_threshold": -1}}
    status = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).status_code
    if status != (200 if plain else 400):
        raise RuntimeError(f"{'plain vLLM' if plain else 'em-serve'} answers {status}")


def prompts_of(model: str, count: int) -> list[list[int]]:
    """Token ids of chats about held-out problems for the demo model, random ones for a model that knows nothing."""
    if model == "demo":
        questions = [problem.question for problem in problems("held_out", count, seed=0)]
        return [[*chat_turn("user", question), VOCABULARY["<|assistant|>"]] for question in questions]
    rng = random.Random(0)
    return [rng.choices(range(1, dummy.SIZES[model]["vocab_size"]), k=32) for _ in range(count)]


def bodies(model: str, arm: Arm, prompts: Sequence[list[int]], tokens: int, number: int) -> list[dict[str, Any]]:
    """A turn's requests: in every round the same prompts (a prefix cache serves all arms alike), with other seeds."""
    common: dict[str, Any] = {"model": model, "max_tokens": tokens, "ignore_eos": True, "temperature": 1}
    if arm.em_inf is not None:
        common["em_inf"] = {**arm.em_inf, "stats": "summary" if number < 0 else "none"}
    first = (number + 1) * len(prompts)
    return [{**common, "prompt": prompt, "seed": first + index} for index, prompt in enumerate(prompts)]


async def measure(running: dict[bool, Server], args: argparse.Namespace, start: int) -> list[Turn]:
    """Every turn of every arm, at each concurrency, of one start."""
    turns = []
    async with client(running[True].url) as plain, client(running[False].url) as ours:
        for concurrency in args.concurrency:
            prompts = prompts_of(args.model, args.requests or max(8, 4 * concurrency))
            for number in range(-1, args.rounds):
                names = list(ARMS)
                for name in names if number % 2 else reversed(names):
                    arm = ARMS[name]
                    requests = bodies(args.model, arm, prompts, args.tokens, number)
                    await asyncio.sleep(SETTLE if args.executor == "mp" else 0)
                    bystanders = Bystanders(*running.values())
                    rate, answers = await turn(plain if arm.plain else ours, requests, concurrency)
                    _check_lengths(answers, args.tokens)
                    others, optimised = bystanders.busy_cores(), _optimised(answers)
                    turns.append(Turn(concurrency, number, name, rate, start, others, optimised))
    return turns


def _check_lengths(answers: Iterable[dict[str, Any]], tokens: int) -> None:
    lengths = {answer["usage"]["completion_tokens"] for answer in answers}
    if lengths != {tokens}:
        raise RuntimeError(f"replies of {sorted(lengths)} tokens, not of {tokens}")


def _optimised(answers: Iterable[dict[str, Any]]) -> float | None:
    entries = [entry for answer in answers for entry in answer.get("em_inf", [])]
    tokens = sum(entry["tokens"] for entry in entries)
    return sum(entry["optimized_tokens"] for entry in entries) / tokens if tokens else None


def rates_of(turns: Iterable[Turn], concurrency: int, arm: str) -> list[float]:
    """Output tokens per second in each round but the one that warms up."""
    return [each.rate for each in turns if (each.concurrency, each.arm) == (concurrency, arm) and each.round >= 0]


def report(args: argparse.Namespace, turns: Sequence[Turn], released: Sequence[float]) -> None:
    """The table, a row for each arm at each concurrency, and what it says about the targets."""
    print(
        f"\n| {args.model}: concurrency | arm | output tokens/s | of | same round, median | 95 % | tokens optimised |"
    )
    print("|---|---|---|---|---|---|---|")
    for concurrency in args.concurrency:
        for name in ARMS:
            print(_row(turns, concurrency, name))
    if released:
        print(f"| 1 | released, transformers | {spread(released, 1)} | | | | |")
    print()
    for concurrency in args.concurrency:
        print("\n".join(_findings(args.model, turns, concurrency, released)))


def _row(turns: Sequence[Turn], concurrency: int, name: str) -> str:
    rates, base, starts = rates_of(turns, concurrency, name), ARMS[name].base, len({each.start for each in turns})
    warm = next(each for each in turns if (each.concurrency, each.arm, each.round) == (concurrency, name, -1))
    cells = [str(concurrency), name, spread(rates, 0)]
    if base:
        ratios = paired(rates, rates_of(turns, concurrency, base))
        cells += [base, f"{statistics.median(ratios):.3f}", "{:.3f} to {:.3f}".format(*interval(ratios, starts))]
    else:
        cells += [""] * 3
    cells.append("" if warm.optimised is None else f"{warm.optimised:.1%}")
    return f"| {' | '.join(cells)} |"


def _findings(model: str, turns: Sequence[Turn], concurrency: int, released: Sequence[float]) -> list[str]:
    off, on = rates_of(turns, concurrency, OFF), rates_of(turns, concurrency, ON)
    low, high = interval(paired(off, rates_of(turns, concurrency, PLAIN)), len({each.start for each in turns}))
    share, target = statistics.median(paired(on, off)), MODELS[model].target
    found = [
        f"off / plain vLLM: the interval {'includes' if low <= 1 <= high else 'leaves out'} 1",
        f"on / off {share:.3f}: {'meets' if share >= target else 'misses'} {target}",
    ]
    if released:
        times = statistics.median(on) / statistics.median(released)
        found.append(f"on / released: {times:.1f} times as many tokens per second")
    return [f"- concurrency {concurrency}, {each}" for each in found]


def write_csv(path: Path, model: str, turns: Iterable[Turn], released: Iterable[float]) -> None:
    """Every turn, the warm-up's too; the released way has a round for each prompt."""
    rows = [astuple(each) for each in turns]
    rows += [(1, number, "released", rate, None, None, None) for number, rate in enumerate(released)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("model", "concurrency", "round", "arm", "tokens_per_second", "start", "other_cores", "optimised")
        )
        writer.writerows((model, *row) for row in rows)


def run_servers(args: argparse.Namespace, folder: Path, start: int) -> list[Turn]:
    """Start both, say how idle they are, measure, and stop them."""
    with ExitStack() as stack:
        running = servers(stack, args, folder, start)
        version = httpx.get(f"{running[True].url}/version").json()["version"]
        idle = ", ".join(f"{busy_cores(running[plain], 5):.3f} ({'plain' if plain else 'ours'})" for plain in running)
        print(f"vLLM {version}, {len(os.sched_getaffinity(0))} cores; cores busy while a server is idle: {idle}")
        turns = asyncio.run(measure(running, args, start))
    print(f"cores that other processes kept busy during a turn: {spread([each.others for each in turns], 2)}")
    return turns


def run_released(args: argparse.Namespace, folder: Path) -> list[float]:
    """With the servers stopped."""
    from benchmarks.generate import released_rates  # on CUDA, importing it earlier would take the servers' memory

    dummy_weights = args.model != "demo"
    prompts = prompts_of(args.model, args.released)
    return list(released_rates(folder, prompts, args.tokens, dummy_weights)) if prompts else []


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--starts", type=int, default=4, help="of both servers, who comes first alternates")
    parser.add_argument("--rounds", type=int, default=6, help="of each start, after the first, which warms up")
    parser.add_argument(
        "--requests", type=int, help="in a turn (default: four for each that runs at a time, at least 8)"
    )
    parser.add_argument("--tokens", type=int, default=48, help="of each reply")
    parser.add_argument("--concurrency", type=int, nargs="+", help="requests at a time (default: the model's)")
    parser.add_argument("--executor", choices=("uni", "mp"), default="uni", help="see benchmarks/launch.py")
    parser.add_argument("--released", type=int, default=8, help="prompts for the released way; 0 leaves it out")
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench"), help="folder for the CSV and the servers' logs"
    )
    parser.add_argument("--quick", action="store_true", help="does it run: 2 rounds of 8 tokens")
    args = parser.parse_args()
    args.concurrency = args.concurrency or list(MODELS[args.model].concurrency)
    if args.quick:
        args.starts, args.rounds, args.tokens, args.released = 1, 2, 8, min(args.released, 2)
    return args


def main() -> None:
    """Measure, print the table, write the CSV."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = demo.MODEL_PATH if args.model == "demo" else Path(temporary)
        if args.model != "demo":
            dummy.write_model(folder, args.model)
        turns = [each for start in range(args.starts) for each in run_servers(args, folder, start)]
        released = run_released(args, folder)
    report(args, turns, released)
    write_csv(args.out / f"serving-{args.model}.csv", args.model, turns, released)


if __name__ == "__main__":
    main()
