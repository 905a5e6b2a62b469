"""`em-train` in a process of test_processes.py: FSDP or DeepSpeed, as accelerate's environment says, on the CPU."""

import atexit
import os
import sys
import threading

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)

from em_train import trainers  # noqa: E402
from em_train.cli import main  # noqa: E402

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    arguments = trainers.training_arguments
    trainers.training_arguments = lambda settings: arguments(settings) | {"use_cpu": False}
    PartialState()
else:
    torch.distributed.init_process_group("gloo")

build = trainers.build_trainer


def build_and_print(*arguments):
    trainer = build(*arguments)
    how = "deepspeed" if trainer.is_deepspeed_enabled else "fsdp" if trainer.is_fsdp_enabled else "neither"
    print(f"{how}: {trainer.accelerator.distributed_type}")
    return trainer


trainers.build_trainer = build_and_print


def release_tensors_for_ever():
    """Do at any time what gloo's threads do seldom: be without the interpreter when it shuts down, and need it then."""
    rows = torch.ones(100, 100)
    while True:
        rows @ rows


atexit.register(threading.Thread(target=release_tensors_for_ever, daemon=True).start)
sys.exit(main())
