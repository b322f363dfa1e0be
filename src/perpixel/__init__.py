"""perpixel: every pixel of every image labelled, and how far to trust it.

The public names load on first use, so that `import perpixel` is instant and loads neither torch nor timm.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perpixel.calibrate import calibrate
    from perpixel.check import check
    from perpixel.compare import compare
    from perpixel.evaluate import evaluate
    from perpixel.models import build, convolutionize
    from perpixel.predict import Segmenter, load
    from perpixel.refine import refine
    from perpixel.tiling import predict_tiled
    from perpixel.train import train
    from perpixel.tune import tune

__version__ = "0.1.0"
__all__ = [
    "Segmenter",
    "build",
    "calibrate",
    "check",
    "compare",
    "convolutionize",
    "evaluate",
    "load",
    "predict_tiled",
    "refine",
    "train",
    "tune",
]

_HOME = {
    "Segmenter": "perpixel.predict",
    "build": "perpixel.models",
    "calibrate": "perpixel.calibrate",
    "check": "perpixel.check",
    "compare": "perpixel.compare",
    "convolutionize": "perpixel.models",
    "evaluate": "perpixel.evaluate",
    "load": "perpixel.predict",
    "predict_tiled": "perpixel.tiling",
    "refine": "perpixel.refine",
    "train": "perpixel.train",
    "tune": "perpixel.tune",
}


class _Package(ModuleType):
    """Where a function and the file it lives in share a name, the name means the function.

    Importing perpixel/train.py binds the module as `perpixel.train`; that binding is dropped here. `from perpixel.train import ...`
    is not touched by this.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'perpixel' has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
