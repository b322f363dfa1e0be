"""The error atlas: the images with the largest loss, each as image, truth, prediction, error and entropy."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perpixel.report.seen import Seen
from perpixel.report.thumbnails import error_layer, heat, label_layer, photo

COUNT, SIDE = 48, 480  # images kept, and the longer side of their pictures; about 100 kB each


@dataclass(frozen=True)
class Entry:
    """One image of the atlas; pictures are encoded WebP.

    Attributes:
        loss: mean cross-entropy in nats per labelled pixel.
        accuracy: share of the labelled pixels that are right.
        entropy: mean over all pixels, as a share of ln K.
        iou: class -> its IoU within the image, of those in truth or prediction.
        size: (height, width) of the image in pixels.
        photo, uncertainty: pictures; truth, guess, error: layers to lie over the photo.
    """

    name: str
    size: tuple[int, int]
    loss: float
    accuracy: float
    entropy: float
    iou: dict[int, float]
    photo: bytes
    truth: bytes
    guess: bytes
    error: bytes
    uncertainty: bytes

    @property
    def bytes(self) -> int:
        return sum(map(len, (self.photo, self.truth, self.guess, self.error, self.uncertainty)))


class Atlas:
    """Keeps the `count` images with the largest loss of a stream, drawn small when they come; of equal losses the first seen."""

    def __init__(self, colors: Sequence[tuple[int, int, int]], count: int = COUNT, side: int = SIDE) -> None:
        if count < 1 or side < 1:
            raise ValueError(f"count is {count} and side {side}; an atlas has at least 1 image of at least 1 pixel")
        self.colors, self.count, self.side = list(colors), count, side
        self._heap: list[tuple[float, int, Entry]] = []
        self._seen = 0

    def add(self, seen: Seen) -> None:
        """Look at one image; one without labelled pixels has no loss and is left out."""
        self._seen += 1
        if math.isnan(seen.loss) or not seen.known.any() or (len(self._heap) == self.count and seen.loss <= self._heap[0][0]):
            return
        item = (seen.loss, -self._seen, self._drawn(seen))
        if len(self._heap) < self.count:
            heapq.heappush(self._heap, item)
        else:
            heapq.heapreplace(self._heap, item)

    def merge(self, other: "Atlas") -> None:
        """Add the images of another atlas; of equal losses its own come first."""
        moved = [(loss, number - self._seen, entry) for loss, number, entry in other._heap]
        self._heap = heapq.nlargest(self.count, [*self._heap, *moved], key=lambda item: item[:2])
        heapq.heapify(self._heap)
        self._seen += other._seen

    @property
    def entries(self) -> list[Entry]:
        """The images kept, the largest loss first."""
        return [entry for _, _, entry in sorted(self._heap, key=lambda item: item[:2], reverse=True)]

    def _drawn(self, seen: Seen) -> Entry:
        side, known = self.side, seen.known
        return Entry(
            name=seen.name,
            size=(seen.truth.shape[0], seen.truth.shape[1]),
            loss=seen.loss,
            accuracy=float((seen.truth == seen.guess)[known].mean()),
            entropy=float(seen.entropy.mean()),
            iou=_iou(seen.truth[known], seen.guess[known], len(self.colors)),
            photo=photo(seen.image, side),
            truth=label_layer(seen.truth, self.colors, side),
            guess=label_layer(seen.guess, self.colors, side),
            error=error_layer(seen.truth, seen.guess, side),
            uncertainty=heat(seen.entropy, side),
        )


def _iou(truth: np.ndarray, guess: np.ndarray, classes: int) -> dict[int, float]:
    shared = np.bincount(truth[truth == guess], minlength=classes)
    either = np.bincount(truth, minlength=classes) + np.bincount(guess, minlength=classes) - shared
    return {int(k): float(shared[k] / either[k]) for k in np.flatnonzero(either)}
