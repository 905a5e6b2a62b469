"""An arithmetic model of 1.6 million parameters that ships with the package, its problems and its training script.

The import needs neither torch nor transformers: a server uses `MODEL_PATH` alone.
"""

from pathlib import Path
from typing import Final

MODEL_PATH: Final = Path(__file__).resolve().parent / "model"

__all__ = ["MODEL_PATH"]
