"""em-loadtest held to vLLM's own `vllm bench serve`: the same workload on one server, taking turns.

`.venv/bin/python -m benchmarks.independent`. Prompts of 40 tokens, replies of 64, 16 at a time, the demo model.
"""

import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import demo
from benchmarks.launch import EM_SERVE, serve
from loadtest.cli import main as em_loadtest
from loadtest.report import read_json

SCENARIO = "loadtest/scenarios/throughput.yaml"
ROUNDS = 4
# `vllm bench serve` itself looks up the version of a distribution called vllm, which the CPU build is not.
THEIRS = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
NAMES = {  # the other's names of what we both measure
    "requests/s": "request_throughput",
    "output tokens/s": "output_throughput",
    "TTFT p50, ms": "median_ttft_ms",
    "TPOT p50, ms": "median_tpot_ms",
    "ITL p50, ms": "median_itl_ms",
    "E2E p50, ms": "median_e2el_ms",
}


def theirs(url: str, folder: Path) -> dict[str, float]:
    """By `vllm bench serve`."""
    command = [sys.executable, "-c", THEIRS, "--backend", "openai-chat"]
    command += ["--base-url", url, "--endpoint", "/v1/chat/completions", "--model", "demo"]
    command += ["--tokenizer", str(demo.MODEL_PATH), "--dataset-name", "random", "--num-prompts", "400"]
    command += ["--random-input-len", "40", "--random-output-len", "64", "--ignore-eos", "--temperature", "1"]
    command += ["--max-concurrency", "16", "--num-warmups", "16", "--percentile-metrics", "ttft,tpot,itl,e2el"]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", "theirs.json", "--disable-tqdm"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = json.loads((folder / "theirs.json").read_text())
    return {name: found[key] for name, key in NAMES.items()}


def ours(url: str, folder: Path) -> dict[str, float]:
    """By em-loadtest."""
    with contextlib.redirect_stdout(io.StringIO()):
        status = em_loadtest(["run", SCENARIO, "--base-url", url, "--out", str(folder)])
    assert status == 0
    (stage,) = read_json(folder / "results.json").stages
    times = [each.p50 * 1000 if each else 0.0 for each in (stage.latency.ttft, stage.latency.tpot, stage.latency.itl)]
    end = stage.latency.e2e.p50 * 1000 if stage.latency.e2e else 0.0
    figures = [stage.requests_per_second, stage.output_tokens_per_second, *times, end]
    return dict(zip(NAMES, figures, strict=True))


def main() -> None:
    """A table."""
    found: dict[str, list[dict[str, float]]] = {"vllm bench serve": [], "em-loadtest": []}
    with tempfile.TemporaryDirectory() as temporary, serve(*EM_SERVE, log=Path(temporary, "server.log")) as server:
        folder = Path(temporary)
        ours(server.url, folder)  # a warm-up of the server
        for _ in range(ROUNDS):
            found["vllm bench serve"].append(theirs(server.url, folder))
            found["em-loadtest"].append(ours(server.url, folder))
    print("| | vllm bench serve | em-loadtest | em-loadtest / vllm bench serve, by round |\n|---|---|---|---|")
    for name in NAMES:
        values = {tool: [each[name] for each in rounds] for tool, rounds in found.items()}
        cells = [f"{median(each):.4g} ({min(each):.4g} to {max(each):.4g})" for each in values.values()]
        ratios = [our / their for their, our in zip(*values.values(), strict=True)]
        print(f"| {name} | {' | '.join(cells)} | {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |")


if __name__ == "__main__":
    main()
