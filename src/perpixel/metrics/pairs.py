"""A truth and a prediction, checked, with one value for void in both."""

import numpy as np
from scipy import ndimage
from torch import Tensor

VOID = -1


def labelled_pair(
    labels: Tensor | np.ndarray, predicted: Tensor | np.ndarray, classes: int, ignore: int = 255
) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction of one image for scores of shape.

    A pixel without truth is void in the prediction too: nobody knows what belongs there, so a contour drawn inside it is neither right
    nor wrong, and a prediction that is right wherever the truth is known scores 1.

    Args:
        labels: (H, W) integers: class indices 0..K-1, or `ignore`.
        predicted: (H, W) integers: class indices 0..K-1 wherever the label is not `ignore`.
        classes: K, at least 1.
        ignore: not one of the K classes (255; 65535 for uint16 labels).

    Returns:
        Both as C-contiguous (H, W) int32, `VOID` where the label is `ignore`.

    Raises:
        ValueError: if a shape is not (H, W) or the shapes differ, or a value is no class.
        TypeError: if either is not of integers.
    """
    if classes < 1:
        raise ValueError(f"classes is {classes}; a score needs at least 1")
    if 0 <= ignore < classes:
        raise ValueError(f"ignore = {ignore} is one of the {classes} classes; use a value that is not (65535 above 255 classes)")
    truth, guess = integer_map(labels, "labels"), integer_map(predicted, "predicted")
    if truth.shape != guess.shape:
        raise ValueError(f"labels are {truth.shape} and predicted {guess.shape}; they must have the same (height, width)")
    known = truth != ignore
    for name, values in (("labels", truth), ("predicted", guess)):
        wrong = known & ((values < 0) | (values >= classes))
        if wrong.any():
            found = ", ".join(str(value) for value in np.unique(values[wrong])[:5])
            raise ValueError(
                f"{name}: {wrong.sum()} pixels have a value that is not one of the {classes} classes 0..{classes - 1} ({found})"
            )
    return np.where(known, truth.astype(np.int32), VOID), np.where(known, guess.astype(np.int32), VOID)


def filled(truth: np.ndarray, guess: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both maps with void as the nearest known pixel has it, each its own, for scores of shape.

    As it stands void's edge would be in both maps and match by itself; without that edge an object that void surrounds would have none.
    """
    void = truth == VOID
    if not void.any() or void.all():
        return truth, guess
    rows, columns = ndimage.distance_transform_edt(void, return_distances=False, return_indices=True)
    return truth[rows, columns], guess[rows, columns]


def integer_map(values: Tensor | np.ndarray, name: str) -> np.ndarray:
    """An (H, W) array of integers or booleans on the CPU, whatever it came as; ValueError or TypeError otherwise."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "iub":
        raise TypeError(f"{name} are {array.dtype}; class indices must be integers (logits need argmax over the classes first)")
    if array.ndim != 2:
        raise ValueError(f"{name}: shape {array.shape}; this score takes one image at a time, as (height, width)")
    return array
