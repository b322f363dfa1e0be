"""A truth and a prediction, checked, with one value for void in both."""

import numpy as np
from numba import njit
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
    both = truth.copy(), guess.copy()
    _fill(void, *both)
    return both


@njit(cache=True, nogil=True)
def _fill(void, truth, guess):  # type: ignore[no-untyped-def]
    """Copy the values of a nearest known pixel (Euclidean) to each void one, in place.

    By the lower envelope of parabolas along each row that has void (Felzenszwalb and Huttenlocher 2012, Theory of Computing 8): a tenth
    of the time of scipy's exact transform with its indices, where void is thin.
    """
    height, width = void.shape
    nearest = np.full((height, width), -1, np.int32)  # the row of the nearest known pixel of the column
    for y in range(height):
        for x in range(width):
            if not void[y, x]:
                nearest[y, x] = y
            elif y > 0:
                nearest[y, x] = nearest[y - 1, x]
    for y in range(height - 2, -1, -1):
        for x in range(width):
            below = nearest[y + 1, x]
            if below > y and (nearest[y, x] < 0 or below - y < y - nearest[y, x]):
                nearest[y, x] = below
    columns, begins, heights = np.empty(width, np.int64), np.empty(width), np.empty(width)
    for y in range(height):
        if not void[y].any():
            continue
        last = -1
        for x in range(width):
            if nearest[y, x] < 0:
                continue
            lift, begin = float((nearest[y, x] - y) ** 2 + x * x), -np.inf
            while last >= 0:
                begin = (lift - heights[last]) / (2 * (x - columns[last]))
                if begin > begins[last]:
                    break
                last -= 1
            last += 1
            columns[last], heights[last], begins[last] = x, lift, begin if last else -np.inf
        k = 0
        for x in range(width):
            while k < last and begins[k + 1] <= x:
                k += 1
            if void[y, x]:
                row, column = nearest[y, columns[k]], columns[k]
                truth[y, x], guess[y, x] = truth[row, column], guess[row, column]


def integer_map(values: Tensor | np.ndarray, name: str) -> np.ndarray:
    """An (H, W) array of integers or booleans on the CPU, whatever it came as; ValueError or TypeError otherwise."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "iub":
        raise TypeError(f"{name} are {array.dtype}; class indices must be integers (logits need argmax over the classes first)")
    if array.ndim != 2:
        raise ValueError(f"{name}: shape {array.shape}; this score takes one image at a time, as (height, width)")
    return array
