"""Read every pair of a set once, in threads, and keep what a diagnosis needs: a few kilobytes for each."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from perpixel.data.duplicates import Fingerprint, fingerprint
from perpixel.data.evidence import ValueCounter, tally
from perpixel.data.images import FULL_SCALE, Picture, inspect, read_image
from perpixel.data.layouts import Pair
from perpixel.data.masks import read_mask

BYTES_IN_FLIGHT = 2**30  # of decoded images and masks at once, whatever the number of threads


@dataclass(frozen=True, eq=False)  # arrays have no one truth value, so readings are compared by identity
class Reading:
    """One usable pair."""

    pair: Pair
    size: tuple[int, int]  # height, width in pixels
    bands: int
    dtype: str
    mean: np.ndarray  # (C,) float64, in units of FULL_SCALE[dtype]
    variance: np.ndarray  # (C,) float64, likewise squared
    values: np.ndarray  # (V,) mask values, ascending; int32 for colours, and only for those
    counts: np.ndarray  # (V,) int64 pixels of each
    fingerprint: Fingerprint

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]


@dataclass(frozen=True)
class Fault:
    """Why a pair can't be used. `mismatch`: both files are sound, but their sizes differ."""

    pair: Pair
    file: str
    message: str
    mismatch: bool = False


class Budget:
    """Bytes that threads share: one waits until there is room for what it is about to decode. What is larger than all is let in alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Hold `size` bytes."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


def survey(
    pairs: Sequence[Pair], progress: Callable[[int, int, str], None] | None = None
) -> tuple[list[Reading], list[Fault], ValueCounter]:
    """Readings and faults in the order of `pairs` (each with a mask), and the values of all usable masks."""
    counter, budget = ValueCounter(), Budget(BYTES_IN_FLIGHT)

    def read(pair: Pair) -> Reading | Fault:
        with budget.room(_decoded_bytes(pair.image)):
            return _read(pair, counter)

    readings: list[Reading] = []
    faults: list[Fault] = []
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="survey")
    try:
        for done, result in enumerate(pool.map(read, pairs), 1):
            readings.append(result) if isinstance(result, Reading) else faults.append(result)
            if progress:
                progress(done, len(pairs), result.pair.image.name)
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for the rest of the set
    return readings, faults, counter


def _decoded_bytes(picture: Picture) -> int:
    """By the header, of an image and a mask of its size (int32 at most), and a copy of each; 0 where the header is damaged."""
    try:
        header = inspect(picture)
    except (ValueError, OSError):
        return 0  # reading it says what is wrong
    return 2 * header.height * header.width * (header.bands * {"uint16": 2, "float32": 4}.get(header.dtype, 1) + 4)


def _read(pair: Pair, counter: ValueCounter) -> Reading | Fault:
    if pair.mask is None:
        raise ValueError(f"{pair.image}: only pairs with a mask can be surveyed.")
    try:
        image = read_image(pair.image)
    except (ValueError, OSError) as error:
        return Fault(pair, str(pair.image), str(error))
    try:
        mask = read_mask(pair.mask)
    except (ValueError, OSError) as error:
        return Fault(pair, str(pair.mask), str(error))
    if image.shape[1:] != mask.shape:
        return Fault(pair, str(pair.image), _mismatch(pair, image.shape[1:], mask.shape), mismatch=True)
    counter.add(mask, pair.mask)
    mean, variance = moments(image)
    values, counts = tally(mask)
    return Reading(pair, mask.shape, image.shape[0], str(image.dtype), mean, variance, values, counts, fingerprint(image))


def _mismatch(pair: Pair, image: tuple[int, ...], mask: tuple[int, ...]) -> str:
    hint = "One of them lies on its side; turn it." if image == mask[::-1] else "Redo the mask, or resize it by nearest neighbour."
    return f"{pair.image} is {image[0]}x{image[1]} but {pair.mask} is {mask[0]}x{mask[1]} pixels (height x width). {hint}"


def moments(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each band of an image (C, H, W), in units of the full range of its dtype."""
    full = FULL_SCALE[str(image.dtype)]
    if image.dtype != np.uint8:
        return (
            np.array([band.mean(dtype=np.float64) for band in image]) / full,
            np.array([band.var(dtype=np.float64) for band in image]) / full**2,
        )
    # A histogram is exact, and needs no float64 copy of a large picture.
    histograms = np.array([Image.fromarray(band).histogram() for band in image], dtype=np.float64) / (image.shape[1] * image.shape[2])
    levels = np.arange(256) / full
    mean = histograms @ levels
    return mean, (histograms * (levels[None] - mean[:, None]) ** 2).sum(axis=1)


def common_form(readings: Sequence[Reading]) -> tuple[int, str]:
    """The bands and dtype that a model of this set works in: the most frequent; three bands where grey and colour are mixed."""
    bands = Counter(reading.bands for reading in readings)
    dtypes = Counter(reading.dtype for reading in readings)
    most = 3 if {1, 3} <= bands.keys() and bands[1] + bands[3] > len(readings) / 2 else bands.most_common(1)[0][0]
    return most, dtypes.most_common(1)[0][0]


def pooled_moments(readings: Sequence[Reading], bands: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (bands,) over all pixels of all images; grey counts in every band.

    Source: the parallel form of Chan, Golub & LeVeque 1979, which does not cancel where the mean is large.
    """
    weights = np.array([reading.pixels for reading in readings], dtype=np.float64)
    weights /= weights.sum()
    means = np.stack([np.broadcast_to(reading.mean, (bands,)) for reading in readings])
    variances = np.stack([np.broadcast_to(reading.variance, (bands,)) for reading in readings])
    mean = weights @ means
    return mean, np.sqrt(weights @ (variances + (means - mean) ** 2))
