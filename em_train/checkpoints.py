"""The checkpoints in a run's folder: which one to resume from, and errors while one is written."""

import contextlib
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from em_train.prompts import InputError
from em_train.run_report import check_same_settings
from em_train.settings import TrainSettings

CHECKPOINTS_DIR = "checkpoints"
STATE_NAME = "trainer_state.json"  # the last file that a trainer writes into a checkpoint

CHECKPOINT_NAME = re.compile("checkpoint-([0-9]{1,18})")
# torch.save reports a full disk by a RuntimeError with one of these texts.
WRITE_ERROR = re.compile("PytorchStreamWriter|inline_container|iostream error")


def prepare_folder(settings: TrainSettings) -> Path | None:
    """Make the run's folder; return the checkpoint to resume from, if any. Incomplete checkpoints are removed.

    Raises:
        InputError: if there is a run but no --resume, or --resume but no run with the same settings.
    """
    found = list_checkpoints(settings)
    if found and not settings.resume:
        raise InputError(
            f"--out: {settings.out} holds a run already; --resume goes on with it, another folder begins anew"
        )
    if settings.resume:
        check_same_settings(settings)
    while found and not _is_complete(found[-1]):
        print(f"em-train: {found[-1]} is incomplete and is removed", file=sys.stderr)
        shutil.rmtree(found.pop(), ignore_errors=True)
    settings.out.mkdir(parents=True, exist_ok=True)
    return found[-1] if found else None


def list_checkpoints(settings: TrainSettings) -> list[Path]:
    """Return the run's checkpoints in the order of their steps."""
    steps = {path: CHECKPOINT_NAME.fullmatch(path.name) for path in (settings.out / CHECKPOINTS_DIR).glob("*")}
    found = {path: int(match[1]) for path, match in steps.items() if match and path.is_dir()}
    return sorted(found, key=found.__getitem__)


@contextlib.contextmanager
def write_errors_as_oserror(settings: TrainSettings) -> Iterator[None]:
    """Raise OSError for what torch and safetensors raise if a checkpoint cannot be written."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, SafetensorError) or WRITE_ERROR.search(str(error)):
            raise OSError(f"a checkpoint could not be written to {settings.out}: {error}") from error
        raise


def _is_complete(checkpoint: Path) -> bool:
    """Return whether a trainer can go on from it, as far as can be told without reading the weights."""
    try:
        state = TrainerState.load_from_json(str(checkpoint / STATE_NAME))
        evaluated = [row for row in state.log_history if "eval_entropy" in row]
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, "pt"):
                pass
    except Exception:  # anything may be wrong with a file
        return False
    saved_by_torch = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    return type(state.global_step) is int and bool(evaluated) and all(map(zipfile.is_zipfile, saved_by_torch))
