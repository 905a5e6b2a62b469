"""What EM-INF costs a server, and what the plugin costs one that does not use it: output tokens/s of each config.

`.venv/bin/python -m benchmarks.serving --model demo`. em-serve and plain vLLM run side by side, and both are started
several times. The configs alternate within each round, and a ratio is of two configs of one round. At the end, with
the servers stopped, the released method runs in transformers, one prompt at a time (transformers_baseline.py).
"""

import argparse
import asyncio
import os
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

import demo
from benchmarks import real_models
from benchmarks.completions import measure_rate, open_client
from benchmarks.intervals import median_and_range
from benchmarks.serving import dummy_model
from benchmarks.serving.configs import CONFIGS, DUMMY_FLAGS, MODELS, prompts_of, request_bodies
from benchmarks.serving.cpu_time import OtherProcesses, busy_cores
from benchmarks.serving.report import Measurement, print_report, write_csv
from harness.launch import EM_SERVE, PLAIN_VLLM, Server, serve
from server.cli import DEMO_FLAGS

PAUSE_S = 1.5  # before each measurement: a worker in a process of its own spins for a second after its last step


def main() -> None:
    """Measure, print the table and write the CSV."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder_of(args.model, Path(temporary))
        measurements = [each for start in range(args.starts) for each in run_servers(args, folder, start)]
        released = run_released(args, folder)
    print_report(args.model, args.concurrency, measurements, released)
    write_csv(args.out / f"serving-{args.model}.csv", args.model, measurements, released)


def folder_of(model: str, temporary: Path) -> Path:
    """Return the folder of a model; one of random weights is written to `temporary`."""
    if model == "demo":
        return demo.MODEL_PATH
    if model in real_models.MODELS:
        return real_models.fetch(model)
    dummy_model.write_model_folder(temporary, model)
    return temporary


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--starts", type=int, default=4, help="starts of both servers; who comes first alternates")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each start, after one more that warms up")
    parser.add_argument(
        "--requests", type=int, help="requests of a config in a round (default: four times the concurrency, at least 8)"
    )
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each reply")
    parser.add_argument("--concurrency", type=int, nargs="+", help="requests at a time (default: the model's)")
    parser.add_argument("--configs", choices=CONFIGS, nargs="+", default=list(CONFIGS), help="default: all")
    parser.add_argument("--executor", choices=("uni", "mp"), default="uni", help="see harness/launch.py")
    parser.add_argument("--released", type=int, default=8, help="prompts for the released method; 0 leaves it out")
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench"), help="folder for the CSV and the servers' logs"
    )
    parser.add_argument("--quick", action="store_true", help="does it run? 2 rounds of 8 tokens")
    args = parser.parse_args()
    args.concurrency = args.concurrency or list(MODELS[args.model].concurrency)
    if args.quick:
        args.starts, args.rounds, args.tokens, args.released = 1, 2, 8, min(args.released, 2)
    return args


def run_servers(args: argparse.Namespace, folder: Path, start: int) -> list[Measurement]:
    """Start both servers, print how idle they are, measure, and stop them."""
    with ExitStack() as stack:
        servers = start_servers(stack, args, folder, start)
        version = httpx.get(f"{servers[True].url}/version").json()["version"]
        idle = ", ".join(f"{busy_cores(servers[plain], 5):.3f} ({'plain' if plain else 'ours'})" for plain in servers)
        print(f"vLLM {version}, {len(os.sched_getaffinity(0))} cores; cores busy while a server is idle: {idle}")
        measurements = asyncio.run(measure(servers, args, start))
    others = median_and_range([each.other_cores for each in measurements], 2)
    print(f"cores that other processes kept busy during a measurement: {others}")
    return measurements


def start_servers(stack: ExitStack, args: argparse.Namespace, folder: Path, start: int) -> dict[bool, Server]:
    """Return both servers, by whether they are plain vLLM.

    They start one after the other, as on CUDA each measures how much memory is free; who is first alternates.
    """
    model, flags = args.model, ("--max-num-seqs", str(max(args.concurrency)), *MODELS[args.model].flags)
    if model == "demo":
        ours, theirs = flags, (str(demo.MODEL_PATH), *DEMO_FLAGS, *flags)
    else:
        dummy = DUMMY_FLAGS if model in dummy_model.SIZES else ()
        ours = theirs = (str(folder), "--served-model-name", model, *dummy, *flags)
    both = {
        False: serve(*EM_SERVE, *ours, log=args.out / "em-serve.log", executor=args.executor),
        True: serve(*PLAIN_VLLM, *theirs, log=args.out / "plain-vllm.log", executor=args.executor),
    }
    running = {plain: stack.enter_context(both[plain]) for plain in sorted(both, reverse=start % 2 == 1)}
    for plain, server in running.items():
        _check_plugin(server, model, plain)
    return running


def _check_plugin(server: Server, model: str, plain: bool) -> None:
    """Check that the plugin is there, or not: it alone rejects settings that are out of range."""
    body = {"model": model, "prompt": [1], "max_tokens": 1, "vllm_xargs": {"em_inf_threshold": -1}}
    status = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).status_code
    if status != (200 if plain else 400):
        raise RuntimeError(f"{'plain vLLM' if plain else 'em-serve'} answers {status}")


async def measure(servers: dict[bool, Server], args: argparse.Namespace, start: int) -> list[Measurement]:
    """Measure every config in every round at each concurrency, on the servers of one start."""
    measurements = []
    async with open_client(servers[True].url) as plain, open_client(servers[False].url) as ours:
        for concurrency in args.concurrency:
            prompts = prompts_of(args.model, args.requests or max(8, 4 * concurrency))
            for number in range(-1, args.rounds):
                names = args.configs
                for name in names if number % 2 else reversed(names):
                    config = CONFIGS[name]
                    bodies = request_bodies(args.model, config, prompts, args.tokens, number)
                    await asyncio.sleep(PAUSE_S if args.executor == "mp" else 0)
                    others = OtherProcesses(*servers.values())
                    rate, responses = await measure_rate(plain if config.plain else ours, bodies, concurrency)
                    _check_lengths(responses, args.tokens)
                    other_cores, optimised = others.busy_cores(), _optimised_share(responses)
                    measurements.append(Measurement(concurrency, number, name, rate, start, other_cores, optimised))
    return measurements


def _check_lengths(responses: Iterable[dict[str, Any]], tokens: int) -> None:
    lengths = {response["usage"]["completion_tokens"] for response in responses}
    if lengths != {tokens}:
        raise RuntimeError(f"replies of {sorted(lengths)} tokens, not of {tokens}")


def _optimised_share(responses: Iterable[dict[str, Any]]) -> float | None:
    """Return the share of tokens with at least one gradient step; None if the responses have no summaries."""
    summaries = [summary for response in responses for summary in response.get("em_inf", [])]
    tokens = sum(summary["tokens"] for summary in summaries)
    return sum(summary["optimized_tokens"] for summary in summaries) / tokens if tokens else None


def run_released(args: argparse.Namespace, folder: Path) -> list[float]:
    """Return output tokens per second of the released method, one figure for each prompt."""
    from benchmarks.serving.transformers_baseline import released_rates  # on CUDA it takes memory from the servers

    prompts = prompts_of(args.model, args.released)
    return list(released_rates(folder, prompts, args.tokens, args.model in dummy_model.SIZES)) if prompts else []


if __name__ == "__main__":
    main()
