"""Which confusions cost most, and what they look like."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from perpixel.report.seen import Seen
from perpixel.report.thumbnails import Box, around, cut, label_layer, photo

PER_IMAGE, PER_PAIR, PAIRS = 3, 3, 48  # confusions looked at in each image; crops of a pair; pairs with crops
SIDE = 180


@dataclass(frozen=True)
class Crop:
    """A piece of an image around one connected region, as encoded WebP; truth and guess are layers to lie over the photo."""

    name: str  # of the image
    box: Box  # the piece
    region: Box  # what it is about, within the image
    weight: float  # what the crops of a kind are ranked by
    photo: bytes
    truth: bytes
    guess: bytes

    @property
    def mark(self) -> tuple[float, float, float, float]:
        """Left, top, width and height of the region within the piece, in percent."""
        top, left, bottom, right = self.box
        height, width = (bottom - top) / 100, (right - left) / 100
        y, x, end_y, end_x = self.region
        return (x - left) / width, (y - top) / height, (end_x - x) / width, (end_y - y) / height

    @property
    def bytes(self) -> int:
        return len(self.photo) + len(self.truth) + len(self.guess)


@dataclass(frozen=True)
class Confusion:
    """Pixels of one class taken for another, over the set.

    `share` is their part of the cross-entropy summed over all labelled pixels.
    """

    truth: int
    guess: int
    pixels: int
    share: float
    crops: tuple[Crop, ...]


class Confusions:
    """Streaming cost of each pair of classes, with the costliest regions of some pairs as crops; memory does not grow with the set.

    In each image the three costliest pairs are looked at; of a pair the costliest region of an image is a candidate, and three are kept.
    Where more than `PAIRS` pairs have crops, those with the cheapest are dropped.
    """

    def __init__(self, colors: Sequence[tuple[int, int, int]]) -> None:
        self.colors, classes = list(colors), len(colors)
        self.costs, self.pixels = np.zeros((classes, classes)), np.zeros((classes, classes), np.int64)
        self._crops: dict[tuple[int, int], list[Crop]] = {}

    def add(self, seen: Seen) -> None:
        """Count one image."""
        classes, known, losses = len(self.colors), seen.known, seen.pixel_losses
        pairs = seen.truth[known] * classes + seen.guess[known]
        costs = np.bincount(pairs, losses[known], classes**2).reshape(classes, classes)
        self.costs += costs
        self.pixels += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        np.fill_diagonal(costs, 0)
        for place in np.argsort(-costs, axis=None)[:PER_IMAGE]:
            truth, guess = (int(index) for index in np.unravel_index(place, costs.shape))
            if costs[truth, guess] > 0:
                self._crop(seen, losses, truth, guess)

    def merge(self, other: "Confusions") -> None:
        """Add the counts and crops of another one with the same classes."""
        self.costs += other.costs
        self.pixels += other.pixels
        for pair, crops in other._crops.items():
            self._keep(pair, crops)

    def worst(self, count: int = 6) -> list[Confusion]:
        """The costliest confusions, costliest first."""
        costs = self.costs.copy()
        np.fill_diagonal(costs, 0)
        found = []
        for place in np.argsort(-costs, axis=None)[:count]:
            truth, guess = (int(index) for index in np.unravel_index(place, costs.shape))
            if costs[truth, guess] > 0:
                share = float(costs[truth, guess] / self.costs.sum())
                crops = tuple(self._crops.get((truth, guess), ()))
                found.append(Confusion(truth, guess, int(self.pixels[truth, guess]), share, crops))
        return found

    def _crop(self, seen: Seen, losses: np.ndarray, truth: int, guess: int) -> None:
        regions, count = ndimage.label((seen.truth == truth) & (seen.guess == guess))
        weights = ndimage.sum_labels(losses, regions, np.arange(1, count + 1))
        best = int(np.argmax(weights))
        held = self._crops.get((truth, guess), [])
        if len(held) == PER_PAIR and weights[best] <= held[-1].weight:
            return
        rows, columns = ndimage.find_objects(regions)[best]
        crop = crop_of(seen, (rows.start, columns.start, rows.stop, columns.stop), float(weights[best]), self.colors)
        self._keep((truth, guess), [crop])

    def _keep(self, pair: tuple[int, int], crops: Sequence[Crop]) -> None:
        both = [*self._crops.get(pair, []), *crops]
        self._crops[pair] = sorted(both, key=lambda crop: -crop.weight)[:PER_PAIR]
        if len(self._crops) > PAIRS:
            del self._crops[min(self._crops, key=lambda pair: self._crops[pair][0].weight)]


def crop_of(seen: Seen, box: Box, weight: float, colors: Sequence[tuple[int, int, int]], side: int = SIDE) -> Crop:
    """The surroundings of a box, drawn small."""
    part = around(box, seen.truth.shape)
    return Crop(
        seen.name,
        part,
        box,
        weight,
        photo(cut(seen.image, part), side),
        label_layer(cut(seen.truth, part), colors, side),
        label_layer(cut(seen.guess, part), colors, side),
    )
