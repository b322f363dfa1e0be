"""What it means to read a picture window by window: a `Source` gives any rectangle of it, and says what it does not know there.

`sources.py` finds and opens them; `tiff_windows.py`, `zarr_windows.py` and `geo.py` read their kinds of file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

import numpy as np

from perpixel.data.images import FULL_SCALE

LARGEST = np.finfo(np.float32).max  # pixels of other number types become float32


@dataclass(frozen=True)
class Place:
    """Where on Earth a picture lies: GeoTIFF tags, copied as they stand, and the stored number that means "no data"."""

    tags: tuple[tuple[int, int, int, Any, bool], ...] = ()  # (code, type, count, value, once), as tifffile writes them
    nodata: float | None = None


NO_PLACE = Place()


@dataclass(frozen=True)
class Window:
    """A part of a picture as read."""

    pixels: np.ndarray  # (C, h, w) uint8, uint16 or float32, as `read_image` gives them
    known: np.ndarray | None = None  # (h, w) bool, False where the file is damaged or says that it has no data; None: all known
    damage: dict[tuple[int, int, int, int], str] = field(default_factory=dict)  # (top, left, height, width) of a segment -> why


class Source(Protocol):
    """A picture that can be read in parts."""

    size: tuple[int, int]  # (height, width)
    bands: int
    place: Place  # where on Earth, if known
    segment: tuple[int, int]  # (height, width) of what is decoded at a time

    def read(self, top: int, left: int, height: int, width: int) -> Window:
        """A window that lies wholly inside the picture. Raises PictureError where nothing of the file can be read."""
        ...

    def keep(self, rows: int) -> None:
        """Windows of `rows` rows come from left to right, so strips have to be kept for all of them."""
        ...

    def held(self, rows: int) -> int:
        """Bytes that it holds beside the window in hand, at most, when windows of `rows` rows come from left to right (`keep`)."""
        ...

    def close(self) -> None:
        """Nothing more is read."""
        ...


@dataclass
class WholeSource:
    """A picture in memory, decoded once."""

    pixels: np.ndarray  # (C, H, W)
    place: Place = NO_PLACE

    def __post_init__(self) -> None:
        self.bands, self.size = self.pixels.shape[0], (self.pixels.shape[1], self.pixels.shape[2])
        self.segment = self.size

    def read(self, top: int, left: int, height: int, width: int) -> Window:
        """A view."""
        return Window(self.pixels[:, top : top + height, left : left + width])

    def keep(self, rows: int) -> None:
        """All is kept as it is."""

    def held(self, rows: int) -> int:
        """All of it."""
        return self.pixels.nbytes

    def close(self) -> None:
        """Nothing is open."""


def _hole_words(name: object, top: int, left: int, height: int, width: int, why: str) -> str:
    return f"{name}: rows {top} to {top + height - 1}, columns {left} to {left + width - 1} are damaged ({why})"


def hole_lines(name: object, damage: Mapping[tuple[int, int, int, int], str]) -> list[str]:
    """What is told of the damaged pieces of a picture; neighbours that are damaged alike are told as one rectangle."""
    pieces: list[tuple[int, int, int, int, str]] = []
    for (top, left, height, width), why in sorted(damage.items()):
        if pieces and (top, height, why) == (pieces[-1][0], pieces[-1][2], pieces[-1][4]) and pieces[-1][1] + pieces[-1][3] == left:
            left, width = pieces[-1][1], pieces.pop()[3] + width
        pieces.append((top, left, height, width, why))
    joined: list[tuple[int, int, int, int, str]] = []
    for top, left, height, width, why in sorted(pieces, key=lambda piece: (piece[1], piece[3], piece[0])):
        if joined and (left, width, why) == (joined[-1][1], joined[-1][3], joined[-1][4]) and joined[-1][0] + joined[-1][2] == top:
            top, height = joined[-1][0], joined.pop()[2] + height
        joined.append((top, left, height, width, why))
    return [_hole_words(name, *piece) for piece in sorted(joined)]


Box = tuple[int, int, int, int]


def segments_in(size: tuple[int, int], segment: tuple[int, int], window: Box) -> Iterator[tuple[Box, Box]]:
    """The segments of a picture that a window touches: (top, left, height, width) of each, and (top, left, bottom, right) in the window."""
    (rows, columns), (high, wide), (top, left, height, width) = size, segment, window
    for y, x in product(range(top // high * high, top + height, high), range(left // wide * wide, left + width, wide)):
        seen = (max(y, top), max(x, left), min(y + high, top + height), min(x + wide, left + width))
        yield (y, x, min(high, rows - y), min(wide, columns - x)), seen


def without_nodata(stored: np.ndarray, known: np.ndarray | None, nodata: float | None) -> np.ndarray | None:
    """`known`, and False where all bands have the number for "no data", or one is NaN, infinite or beyond float32; those become 0."""
    missing = np.zeros(stored.shape[1:], bool)
    if stored.dtype.kind == "f":
        missing |= ~(np.abs(stored) <= LARGEST).all(0)
    if nodata is not None and np.isfinite(nodata):
        missing |= (stored == nodata).all(0)
    if not missing.any():
        return known
    stored[:, missing] = 0
    return ~missing if known is None else known & ~missing


def as_window(pixels: np.ndarray, known: np.ndarray | None, damage: dict[Any, str]) -> Window:
    """Number types as `read_image` gives them."""
    if str(pixels.dtype) not in FULL_SCALE:
        pixels = pixels.astype(np.float32)
    return Window(np.ascontiguousarray(pixels), known, damage)
