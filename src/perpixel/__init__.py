"""perpixel: every pixel of every image labelled, and how far to trust it.

The public names load on first use, so that `import perpixel` is instant and loads neither torch nor timm.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perpixel.check import check
    from perpixel.evaluate import evaluate
    from perpixel.models import build
    from perpixel.predict import Segmenter, load
    from perpixel.tiling import predict_tiled
    from perpixel.train import train

__version__ = "0.1.0"
__all__ = ["Segmenter", "build", "check", "evaluate", "load", "predict_tiled", "train"]

_HOME = {
    "Segmenter": "perpixel.predict",
    "build": "perpixel.models",
    "check": "perpixel.check",
    "evaluate": "perpixel.evaluate",
    "load": "perpixel.predict",
    "predict_tiled": "perpixel.tiling",
    "train": "perpixel.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'perpixel' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
