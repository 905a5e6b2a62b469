"""`em-train`: sample a model's own outputs, and train the model on them without labels.

Exit status: 0 success, 1 a failure of the machine (disk), 2 a wrong setting or input, 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence

from em_train.prompts import InputError
from em_train.settings import SampleSettings, TrainSettings, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
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


if __name__ == "__main__":
    sys.exit(main())
