"""Every refiner by its name."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from perpixel.refinement.dense_crf import NETWORK_SCORES, DenseCRF
from perpixel.refinement.gaussian_crf import GaussianCRF
from perpixel.refinement.grid_mrf import GridMRF
from perpixel.refinement.watershed import Watershed

REFINERS: dict[str, type[nn.Module]] = {
    "dense_crf": DenseCRF,
    "grid_mrf": GridMRF,
    "gaussian_crf": GaussianCRF,
    "watershed": Watershed,
}


def build_refiner(name: str, options: Mapping[str, Any] | None = None, full_scale: float = 255.0) -> nn.Module:
    """A refiner by its name in `REFINERS`, in eval mode.

    Args:
        name: "dense_crf", "grid_mrf", "gaussian_crf" or "watershed".
        options: arguments of its class; the others take their defaults.
        full_scale: the value of a white pixel. Where no kernels are given, the dense CRF's bandwidths of colours, which are made for 255,
            are scaled to it.

    Raises:
        ValueError: for an unknown name or option, or an illegal value.
    """
    if name not in REFINERS:
        raise ValueError(f"unknown refiner {name!r}. Known: {', '.join(REFINERS)}")
    known = list(inspect.signature(REFINERS[name]).parameters)
    if wrong := [option for option in options or {} if option not in known]:
        raise ValueError(f"refiner {name!r} has no option {wrong[0]!r}; it takes {', '.join(known)}")
    if name == "dense_crf" and "kernels" not in (options or {}):
        scale = full_scale / 255
        kernels = [{key: value * scale if key == "colour" else value for key, value in kernel.items()} for kernel in NETWORK_SCORES]
        options = {**(options or {}), "kernels": kernels}
    try:
        return REFINERS[name](**(options or {})).eval()
    except TypeError as error:
        raise ValueError(f"refiner {name!r}: an option has a value of the wrong kind: {error}") from None
