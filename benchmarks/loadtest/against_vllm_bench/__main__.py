"""em-loadtest beside vLLM's own `vllm bench serve`: the same load on one server, by both in turn.

`.venv/bin/python -m benchmarks.loadtest.against_vllm_bench`. Prompts of 40 tokens, replies of 64, 16 at a time, on the
demo model.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import demo
from harness.launch import EM_SERVE, serve
from loadtest.cli import main as em_loadtest
from loadtest.storage import read_json

SCENARIO = "loadtest/scenarios/throughput.yaml"
ROUNDS = 4
# The command `vllm bench serve` asks for the version of a distribution called vllm, which the CPU build is not.
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
VLLM_BENCH_KEYS = {  # what both measure, and its name in the results of `vllm bench serve`
    "requests/s": "request_throughput",
    "output tokens/s": "output_throughput",
    "TTFT p50, ms": "median_ttft_ms",
    "TPOT p50, ms": "median_tpot_ms",
    "ITL p50, ms": "median_itl_ms",
    "E2E p50, ms": "median_e2el_ms",
}


def run_vllm_bench(url: str, folder: Path) -> dict[str, float]:
    """Return the figures of one run of `vllm bench serve`."""
    command = [sys.executable, "-c", VLLM_BENCH, "--backend", "openai-chat"]
    command += ["--base-url", url, "--endpoint", "/v1/chat/completions", "--model", "demo"]
    command += ["--tokenizer", str(demo.MODEL_PATH), "--dataset-name", "random", "--num-prompts", "400"]
    command += ["--random-input-len", "40", "--random-output-len", "64", "--ignore-eos", "--temperature", "1"]
    command += ["--max-concurrency", "16", "--num-warmups", "16", "--percentile-metrics", "ttft,tpot,itl,e2el"]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", "theirs.json", "--disable-tqdm"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = json.loads((folder / "theirs.json").read_text())
    return {name: found[key] for name, key in VLLM_BENCH_KEYS.items()}


def run_em_loadtest(url: str, folder: Path) -> dict[str, float]:
    """Return the same figures of one run of em-loadtest."""
    with contextlib.redirect_stdout(io.StringIO()):
        status = em_loadtest(["run", SCENARIO, "--base-url", url, "--out", str(folder)])
    assert status == 0
    (stage,) = read_json(folder / "results.json").stages
    latency = stage.latency
    times_ms = [each.p50 * 1000 if each else 0.0 for each in (latency.ttft, latency.tpot, latency.itl, latency.e2e)]
    figures = [stage.requests_per_second, stage.output_tokens_per_second, *times_ms]
    return dict(zip(VLLM_BENCH_KEYS, figures, strict=True))


def main() -> None:
    """Run both in turn and print a table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    results: dict[str, list[dict[str, float]]] = {"vllm bench serve": [], "em-loadtest": []}
    with tempfile.TemporaryDirectory() as temporary, serve(*EM_SERVE, log=Path(temporary, "server.log")) as server:
        folder = Path(temporary)
        run_em_loadtest(server.url, folder)  # warms the server up
        for _ in range(ROUNDS):
            results["vllm bench serve"].append(run_vllm_bench(server.url, folder))
            results["em-loadtest"].append(run_em_loadtest(server.url, folder))
    print("| | vllm bench serve | em-loadtest | em-loadtest / vllm bench serve, by round |\n|---|---|---|---|")
    for name in VLLM_BENCH_KEYS:
        values = {tool: [each[name] for each in rounds] for tool, rounds in results.items()}
        cells = [f"{median(each):.4g} ({min(each):.4g} to {max(each):.4g})" for each in values.values()]
        ratios = [our / their for their, our in zip(*values.values(), strict=True)]
        print(f"| {name} | {' | '.join(cells)} | {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |")


if __name__ == "__main__":
    main()
