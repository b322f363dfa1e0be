"""How much each class and each pixel of a training set counts."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from perpixel.check import Check
from perpixel.losses import border_weights, class_weights


def training_class_weights(kind: str | list[float], report: Check) -> Tensor | None:
    """(K,) weights; computed ones of mean 1 over the training pixels, so that the learning rate and the other losses keep their meaning.

    A list is taken as it is.
    """
    if kind == "none":
        return None
    if not isinstance(kind, str):
        if len(kind) != len(report.classes):
            names = ", ".join(report.classes)
            raise ValueError(
                f"train.class_weights has {len(kind)} numbers; there are {len(report.classes)} classes: give one for each of {names}"
            )
        return torch.tensor(kind)
    pixels = report.pixels["train"]
    weights, share = (
        class_weights(kind, pixels, report.pixels_where_present["train"]),
        torch.tensor(pixels, dtype=torch.float64) / sum(pixels),
    )
    return weights / float((weights * share).sum())


def pixel_weighing(weights: Tensor | None, ignore: int) -> Callable[[np.ndarray], np.ndarray]:
    """From labels (H, W) to U-Net's weights (H, W): the class's, 1 without `weights` (K,), plus the border's (eq. 2 of the paper).

    The sum holds the class weights, so the loss gets none of its own. Worker processes can be handed a copy.
    """
    by_label = np.ones(ignore + 1, np.float32)
    if weights is not None:
        by_label[: len(weights)] = weights.numpy()
    return partial(_pixel_weights, by_label=by_label, ignore=ignore)


def _pixel_weights(labels: np.ndarray, *, by_label: np.ndarray, ignore: int) -> np.ndarray:
    weights: np.ndarray = by_label[labels] + border_weights(labels, ignore=ignore)
    return weights
