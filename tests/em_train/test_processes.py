"""Two processes by `accelerate launch`, over gloo: the losses are those of one process.

accelerate allows FSDP and DeepSpeed on accelerators only, though both run on the CPU: `cpu_launch.py` makes it treat
the CPU as one. Everything else is as for a user: the configs that ship, the launcher, the command.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.ports import free_port
from tests.em_train.support import SMALL, curve, ft, train, write_outputs, write_prompts

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "em_train" / "configs"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_outputs(tmp_path_factory.mktemp("data") / "outputs.jsonl", 16)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("alone") / "o"
    return train(ft(outputs=data, out=out, micro_batch_size=2, kl_weight=1)), out


def launch(config: str, command: str, **given: Any) -> dict[str, Any]:
    """Train with two processes, and return the run's report."""
    if config == "deepspeed" and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: DS_BUILD_OPS=0 pip install deepspeed")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    launcher += ["--num_processes", "2", "--main_process_port", str(free_port())]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | given).items()]
    done = subprocess.run(
        [*launcher, str(HERE / "cpu_launch.py"), command, *flags],
        env=os.environ | {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads((given["out"] / "run.json").read_text())
    assert report["processes"] == 2
    assert f"{config}: " in done.stdout, "the processes did not share the model by this library"
    return report


@pytest.mark.parametrize("config", ["fsdp", "deepspeed"])
def test_two_processes_have_the_losses_of_one(
    config: str, data: Path, alone: tuple[dict[str, Any], Path], tmp_path: Path
):
    """Also for the KL to the base model, which is spread over the processes too."""
    report = launch(config, "ft", outputs=data, out=tmp_path / "o", micro_batch_size=2, kl_weight=1)
    assert alone[0]["processes"] == 1
    for name in ("loss", "grad_norm"):
        assert curve(report, name) == pytest.approx(curve(alone[0], name), rel=1e-5), name
    ours, theirs = (load_file(out / "model.safetensors") for out in (tmp_path / "o", alone[1]))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-5)  # a tenth of a step of Adam


@pytest.mark.parametrize("config", ["fsdp", "deepspeed"])
def test_the_base_model_of_rl_is_complete_in_two_processes(config: str, tmp_path: Path):
    """The KL to it is 0 before the first step, and small after it."""
    prompts = write_prompts(tmp_path / "p.jsonl", 8)
    first, second = curve(launch(config, "rl", prompts=prompts, out=tmp_path / "o"), "kl")
    assert abs(first) < 1e-6 < abs(second) < 0.1  # an estimate, which may be below 0
