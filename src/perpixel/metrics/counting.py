"""The loop that counts pairs of classes, on a processor."""

import numpy as np
from numba import njit

_LANES = 4  # consecutive pixels mostly hit the same cell; counting them in turn in separate tables saves waiting for the last write


def pair_counts(truth: np.ndarray, guess: np.ndarray, classes: int, ignore: int) -> tuple[np.ndarray, bool]:
    """Counts (K, K) int64 [truth, guess] of two flat integer arrays, and whether every value counted is a class.

    Pixels whose truth is `ignore`, and pairs with a value that is no class, are not counted.
    """
    lanes = np.zeros((_LANES, classes * classes), np.int64)
    legal = _count(truth, guess, classes, ignore, lanes)
    return lanes.sum(0).reshape(classes, classes), bool(legal)


@njit(cache=True, nogil=True)
def _count(truth, guess, classes, ignore, lanes):  # type: ignore[no-untyped-def]
    legal = True
    for place in range(truth.size):
        t = np.int64(truth[place])
        if t == ignore:
            continue
        g = np.int64(guess[place])
        if t < 0 or t >= classes or g < 0 or g >= classes:
            legal = False
        else:
            lanes[place & (_LANES - 1), t * classes + g] += 1
    return legal
