"""Watershed: objects that touch are divided by a line, and membranes with gaps are closed.

Source: Beucher & Meyer 1993, "The morphological approach to segmentation: the watershed transformation" (flooding from seeds by an ordered
queue, first come first served). SciPy's watershed measures slopes, not heights; scikit-image's is this one but for the order of equal
heights, and would be a dependency for one function.
"""

import math

import numpy as np
import torch
from numba import njit
from scipy import ndimage
from torch import Tensor, nn

from perpixel.refinement.scores import checked

GAP = 10.0  # of a line's score above all others: a probability of 0.99995 of two classes, which thresholds see and a cross-entropy survives
LEVELS = 65535  # of the flood
# Neighbours by sides, then by corners, where sides have left any: the one before and the one after.
TOUCHING = (
    (np.s_[:-1], np.s_[1:]),
    (np.s_[:, :-1], np.s_[:, 1:]),
    (np.s_[:-1, :-1], np.s_[1:, 1:]),
    (np.s_[:-1, 1:], np.s_[1:, :-1]),
)


class Watershed(nn.Module):
    """Divides objects that touch, and closes gaps in what lies between them, by a watershed of the scores.

    Each 4-connected region of pixels that are surely not of the class `between` is the seed of one object. The seeds grow over the image,
    the likeliest pixels of objects first, until they meet; there `between` gets a thin line, across which no two objects touch, not even
    by corners. All other scores stay: a line divides what was one, nothing is ever joined, and what has no seed is left as it is.

    It is for a membrane or a background and what it surrounds: a gap of some pixels is hardly seen by mIoU, but makes one cell of two. All
    classes but `between` are taken together. Gradients pass through the scores that stay, and where a line's own is raised, to the largest.

    Args:
        between: the class that lies between objects.
        seed: the probability of not being of this class, above which a pixel is of a seed. Higher parts more seeds that are joined; lower
            keeps objects that are never so sure.
        smallest: pixels of the smallest seed.
        temperature: what scores are divided by before softmax gives probabilities; a bundle's is given by `Bundle.built_refiner`.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if `seed` or `temperature` is no number.
    """

    def __init__(self, between: int = 0, seed: float = 0.9, smallest: int = 50, temperature: float = 1.0) -> None:
        super().__init__()
        for name, value, least, what in (("between", between, 0, "the number of a class"), ("smallest", smallest, 1, "a number of pixels")):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}; it is {what}, {least} or more")
        for name, number in (("seed", seed), ("temperature", temperature)):
            if not isinstance(number, float | int) or isinstance(number, bool):
                raise TypeError(f"{name} is {number!r}; it is a number")
        if not 0 <= seed < 1:
            raise ValueError(f"seed={seed!r}; it is a probability, from 0 to below 1")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature!r}; it is a finite number above 0")
        self.between, self.seed, self.smallest, self.temperature = between, float(seed), smallest, float(temperature)

    def options(self) -> dict[str, int | float]:
        """The arguments that build this module again, in plain types."""
        return {"between": self.between, "seed": self.seed, "smallest": self.smallest, "temperature": self.temperature}

    def forward(self, logits: Tensor, image: Tensor) -> Tensor:
        """Scores with lines.

        Args:
            logits: (N, K, H, W) float scores before softmax.
            image: (N, C, H, W); its values do not count.

        Returns:
            (N, K, H, W), in the logits' type (float32 or float64) and on their device.

        Raises:
            ValueError: if `checked` refuses the input, or there is no class `between`, or no other.
        """
        logits, _ = checked(logits, image)
        if not self.between < logits.shape[1] or logits.shape[1] < 2:
            raise ValueError(f"between={self.between}, and the scores are of {logits.shape[1]} classes; there must be it and another one")
        objects = 1 - (logits.detach() / self.temperature).softmax(1)[:, self.between]
        lines = torch.from_numpy(np.stack([dividing_lines(each, self.seed, self.smallest) for each in objects.cpu().numpy()]))
        divided = torch.where(lines.to(logits.device), logits.amax(1) + GAP * self.temperature, logits[:, self.between])
        return torch.cat([logits[:, : self.between], divided[:, None], logits[:, self.between + 1 :]], 1)


def dividing_lines(objects: np.ndarray, seed: float, smallest: int) -> np.ndarray:
    """(H, W) bool: where the basins of a flood meet.

    Args:
        objects: (H, W) probability of objects, float; the flood rises from the highest down.
        seed, smallest: see `Watershed`.
    """
    basins, count = ndimage.label(objects > seed)
    small = np.bincount(basins.ravel(), minlength=count + 1) < smallest
    basins[small[basins]] = 0
    _flood(((1 - objects) * LEVELS).astype(np.uint16, order="C"), basins)
    lines = np.zeros(objects.shape, bool)
    for before, after in TOUCHING:
        meet = (basins[before] != basins[after]) & ~(lines[before] | lines[after])
        first = objects[before] <= objects[after]  # of the two that touch, the one that is less of an object
        lines[before] |= meet & first
        lines[after] |= meet & ~first
    return lines


@njit(cache=True, nogil=True)
def _flood(heights, basins):  # type: ignore[no-untyped-def]
    """Numbers every pixel of (H, W) int32 basins that is 0 as its flood does, lowest of (H, W) uint16 heights first, then first come."""
    height, width = basins.shape
    first, last = np.full(LEVELS + 1, -1, np.int64), np.full(LEVELS + 1, -1, np.int64)  # of each level's queue
    following = np.full(basins.size, -1, np.int64)
    level = LEVELS
    for pixel in range(basins.size):
        if basins[pixel // width, pixel % width] != 0:
            level = min(level, _wait(pixel, heights[pixel // width, pixel % width], first, last, following))
    while level <= LEVELS:
        pixel = first[level]
        if pixel < 0:
            level += 1
            continue
        first[level] = following[pixel]
        y, x = pixel // width, pixel % width
        for dy, dx in ((-1, 0), (0, -1), (0, 1), (1, 0)):
            v, u = y + dy, x + dx
            if 0 <= v < height and 0 <= u < width and basins[v, u] == 0:
                basins[v, u] = basins[y, x]
                level = min(level, _wait(v * width + u, heights[v, u], first, last, following))


@njit(cache=True, nogil=True)
def _wait(pixel, level, first, last, following):  # type: ignore[no-untyped-def]
    """Puts a pixel at the end of its level's queue."""
    if first[level] < 0:
        first[level] = pixel
    else:
        following[last[level]] = pixel
    last[level] = pixel
    return level
