"""trocr_fast: TrOCR's text from pictures of lines, with transformers' tokens.

The public names are imported when they are first used, so that `import trocr_fast` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trocr_fast.async_engine import AsyncEngine
    from trocr_fast.drop_in import FallbackWarning, accelerate
    from trocr_fast.errors import CheckpointError, PictureError, TrocrFastError, UsageError
    from trocr_fast.line import Line
    from trocr_fast.trocr import TrOCR

__version__ = "0.1.0.dev0"

__all__ = [
    "AsyncEngine",
    "CheckpointError",
    "FallbackWarning",
    "Line",
    "PictureError",
    "TrOCR",
    "TrocrFastError",
    "UsageError",
    "accelerate",
]

_HOME = {
    "AsyncEngine": "trocr_fast.async_engine",
    "TrOCR": "trocr_fast.trocr",
    "accelerate": "trocr_fast.drop_in",
    "FallbackWarning": "trocr_fast.drop_in",
    "Line": "trocr_fast.line",
    "CheckpointError": "trocr_fast.errors",
    "PictureError": "trocr_fast.errors",
    "TrocrFastError": "trocr_fast.errors",
    "UsageError": "trocr_fast.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trocr_fast' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
