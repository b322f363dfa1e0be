"""Refiners: (logits, image) -> logits, where neighbouring pixels talk.

The names load on first use: scripts that import `perpixel.refinement.pydensecrf` need neither torch nor numba to start.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perpixel.refinement.compatibility import fit_compatibility
    from perpixel.refinement.dense_crf import DenseCRF, crf_as_rnn
    from perpixel.refinement.gaussian_crf import GaussianCRF
    from perpixel.refinement.grid_mrf import GridMRF
    from perpixel.refinement.refiners import REFINERS, build_refiner
    from perpixel.refinement.watershed import Watershed

__all__ = ["REFINERS", "DenseCRF", "GaussianCRF", "GridMRF", "Watershed", "build_refiner", "crf_as_rnn", "fit_compatibility"]

_HOME = {
    "DenseCRF": "dense_crf",
    "crf_as_rnn": "dense_crf",
    "GaussianCRF": "gaussian_crf",
    "GridMRF": "grid_mrf",
    "Watershed": "watershed",
    "REFINERS": "refiners",
    "build_refiner": "refiners",
    "fit_compatibility": "compatibility",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'perpixel.refinement' has no attribute {name!r}")
    return getattr(import_module(f"perpixel.refinement.{_HOME[name]}"), name)
