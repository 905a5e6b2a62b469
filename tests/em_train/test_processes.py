"""Two processes by `accelerate launch`, over gloo: the losses of one process.

accelerate gives FSDP and DeepSpeed to accelerators only, though both run on processors: `on_processors.py` tells it
that these are accelerators. All else is as a user's: the configs that ship, the launcher, the command.
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

from tests.em_train.support import SMALL, curve, ft, trained, write_outputs
from tests.ports import free_port

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "em_train" / "configs"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_outputs(tmp_path_factory.mktemp("data") / "outputs.jsonl", 16)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("alone") / "o"
    return trained(ft(outputs=data, out=out, micro_batch_size=2)), out


@pytest.mark.parametrize("config", ["fsdp", "deepspeed"])
def test_two_processes_have_the_losses_of_one(
    config: str, data: Path, alone: tuple[dict[str, Any], Path], tmp_path: Path
):
    if config == "deepspeed" and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: DS_BUILD_OPS=0 pip install deepspeed")
    flags = SMALL | {"outputs": data, "out": tmp_path / "o", "micro_batch_size": 2}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    launch += ["--num_processes", "2", "--main_process_port", str(free_port())]
    command = [str(HERE / "on_processors.py"), "ft", *(f"--{k.replace('_', '-')}={v}" for k, v in flags.items())]
    done = subprocess.run(
        launch + command,
        env=os.environ | {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    card = json.loads((tmp_path / "o" / "run.json").read_text())
    assert (card["processes"], alone[0]["processes"]) == (2, 1)
    for name in ("loss", "grad_norm"):
        assert curve(card, name) == pytest.approx(curve(alone[0], name), rel=1e-5), name
    assert f"{config}: " in done.stdout, "the processes did not share the model in this way"
    ours, theirs = (load_file(out / "model.safetensors") for out in (tmp_path / "o", alone[1]))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-5)  # a tenth of a step of Adam
