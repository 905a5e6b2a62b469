"""`em-train`: sample a model's own outputs, and train it on them without a label.

Exit status: 0 as it should be, 2 something wrong with what was asked, 1 something wrong with the machine.
"""

import os
import sys
from collections.abc import Sequence

from em_train.prompts import InputError
from em_train.settings import SampleSettings, TrainSettings, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    try:
        settings = parse(arguments)
        if isinstance(settings, SampleSettings):
            from em_train.sample import sample

            told = sample(settings)
        else:
            assert isinstance(settings, TrainSettings)
            from em_train.run import run

            told = run(settings)
    except ModuleNotFoundError as error:
        print(f"em-train: {error.name} is not installed: pip install 'em-inf-server[train]'", file=sys.stderr)
        return 2
    except InputError as error:
        print(f"em-train: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"em-train: {error}; what was written before is whole, --resume goes on from there", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("em-train: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    if os.environ.get("RANK", "0") == "0":
        print(f"em-train: {told}; {settings.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
