"""A 1.6M-parameter arithmetic model that ships with the package, its problems and its training script.

Importing this package loads nothing heavy: `MODEL_PATH` is all a server needs.
"""

from pathlib import Path
from typing import Final

MODEL_PATH: Final = Path(__file__).resolve().parent / "model"

__all__ = ["MODEL_PATH"]
