"""`em-train`: sample a model's own outputs, and train the model on them without labels.

Exit status: 0 success, 1 a failure of the machine (disk), 2 a wrong setting or input, 130 interrupted.
"""

import atexit
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from em_train.prompts import InputError
from em_train.settings import SampleSettings, TrainSettings, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status. One process of several ends here instead (`_leave`)."""
    status = _run(arguments)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _leave(status)
    return status


def _run(arguments: Sequence[str] | None) -> int:
    try:
        settings = parse(arguments)
        if isinstance(settings, SampleSettings):
            from em_train.sample import sample

            outcome = sample(settings)
        else:
            assert isinstance(settings, TrainSettings)
            from em_train.run import run

            outcome = run(settings)
    except ImportError as error:
        problem = f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else error
        print(f"em-train: {problem}: pip install 'em-inf-server[train]'", file=sys.stderr)
        return 2
    except InputError as error:
        print(f"em-train: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"em-train: {error}; earlier checkpoints and outputs are intact, --resume continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("em-train: interrupted; --resume continues from the last checkpoint", file=sys.stderr)
        return 130
    if os.environ.get("RANK", "0") == "0":
        print(f"em-train: {outcome}; {settings.out}")
    return 0


def _leave(status: int) -> NoReturn:
    """End this process with `status`, without the interpreter's own shutdown.

    FSDP keeps gloo's threads alive after the process group was destroyed. One that still has tensors to release when
    the interpreter shuts down aborts the process, and the launcher then fails a run that is complete.
    """
    atexit._run_exitfuncs()  # reporters, such as wandb, send their last figures there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
