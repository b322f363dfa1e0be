"""Windows of zarr arrays and OME-Zarr images (extra `[zarr]`).

Source: OME-Zarr 0.4 and 0.5, https://ngff.openmicroscopy.org (`multiscales`: data sets from the finest on, and the names of their axes).
"""

from importlib import import_module
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from perpixel.data.decoding import PictureError, explained
from perpixel.data.images import Picture
from perpixel.data.windows import NO_PLACE, Window, as_window, segments_in, without_nodata

MARKS = ("zarr.json", ".zgroup", ".zarray")
BANDS_LAST = 4  # an array without names whose last axis is no longer than this holds its bands there
UNNAMED = {
    2: ["yx"],
    3: ["cyx", "yxc", "zyx"],
    4: ["zcyx", "zyxc", "tzyx"],
    5: ["tczyx", "tzcyx", "tzyxc"],
}  # what axes may be, likely first
_NO_DAMAGE = (MemoryError, ImportError, PermissionError)  # what is wrong then is here, not in the file, and the same for every chunk


def is_zarr(path: Path) -> bool:
    """A folder that is a zarr store."""
    return any((path / mark).is_file() for mark in MARKS)


def zarr_slices(path: Path, bands: int | None = None) -> list[Picture]:
    """The pictures of a store: one, or one for each place on axes that are neither rows, columns nor bands (time, depth).

    Args:
        path: of the store.
        bands: of the pictures, where that is known: which axes an array without names has follows from it.
    """
    try:
        count = prod(_array(path, bands)[2].values())
    except PictureError:
        count = 1  # what is wrong with it is told when it is read
    return [Picture(path, page) for page in range(count)] if count > 1 else [Picture(path)]


class ZarrSource:
    """One picture of a zarr store; chunks that cannot be decoded are damage."""

    place = NO_PLACE

    def __init__(self, picture: Picture, bands: int | None = None) -> None:
        self.picture = picture
        self._array, self._axes, others = _array(picture.path, bands)
        places = list(product(*(range(length) for length in others.values())))
        if not 0 <= (picture.page or 0) < len(places):
            raise PictureError(f"{picture}: there is no such picture, only 0 to {len(places) - 1}")
        self._fixed = dict(zip(others, places[picture.page or 0], strict=True))
        shape, chunks = dict(zip(self._axes, self._array.shape, strict=True)), dict(zip(self._axes, self._array.chunks, strict=True))
        self.size, self.segment = (shape["y"], shape["x"]), (chunks["y"], chunks["x"])
        self.bands = shape.get("c", 1)

    def keep(self, rows: int) -> None:
        """Chunks are small; each is decoded once for each window that touches it."""

    def held(self, rows: int) -> int:
        """Chunks (shards) that zarr works on at a time, encoded and decoded, while a window is read; nothing between windows."""
        piece = self._array.shards or self._array.chunks
        count = prod(-(-length // side) for length, side in zip(self._array.shape, piece, strict=True))
        at_once = int(import_module("zarr").config.get("async.concurrency"))
        return 2 * min(at_once, count) * prod(piece) * int(self._array.dtype.itemsize)

    def close(self) -> None:
        """Nothing stays open between reads."""

    def read(self, top: int, left: int, height: int, width: int) -> Window:
        damage: dict[tuple[int, int, int, int], str] = {}
        known: np.ndarray | None = None
        try:
            pixels = self._pixels(top, left, height, width)
        except _NO_DAMAGE as error:
            self._refuse(error)
        except Exception:  # decoders raise a dozen types; which chunk it is shows below
            pixels = np.zeros((self.bands, height, width), np.dtype(self._array.dtype).newbyteorder("="))
            known = np.ones((height, width), bool)
            for place, (y0, x0, y1, x1) in segments_in(self.size, self.segment, (top, left, height, width)):
                part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
                try:
                    pixels[(slice(None), *part)] = self._pixels(y0, x0, y1 - y0, x1 - x0)
                except _NO_DAMAGE as error:
                    self._refuse(error)
                except Exception as error:
                    known[part] = False
                    damage[place] = " ".join(str(error).split())[:200] or type(error).__name__
        if pixels.dtype == bool:
            pixels = pixels.astype(np.uint8) * np.uint8(255)
        known = without_nodata(pixels, known, None)
        return as_window(pixels, known, damage)

    def _refuse(self, error: Exception) -> NoReturn:
        """Say what is wrong here, or pass on that memory ran out: who called may get by with less."""
        if isinstance(error, ImportError):
            raise PictureError(
                f"{self.picture}: a decoder of its chunks is missing ({error}); pip install 'perpixel[zarr]' adds it"
            ) from error
        with explained(self.picture.path, self.picture.page):
            raise error

    def _pixels(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """(C, h, w) as stored, in the byte order of this machine (arrays of zarr 2 keep that of the file)."""
        chosen: dict[str, Any] = {**self._fixed, "y": slice(top, top + height), "x": slice(left, left + width), "c": slice(None)}
        part = np.asarray(self._array[tuple(chosen[axis] for axis in self._axes)])
        part = part.astype(part.dtype.newbyteorder("="), copy=False)
        kept = [axis for axis in self._axes if axis not in self._fixed]
        if "c" not in kept:
            kept, part = ["c", *kept], part[None]
        return part.transpose([kept.index(axis) for axis in "cyx"])


def _array(path: Path, bands: int | None) -> tuple[Any, list[str], dict[str, int]]:
    """The array of full size, the names of its axes, and the lengths of those that are neither c, y nor x."""
    try:
        zarr = import_module("zarr")
    except ImportError:
        raise PictureError(f"{path}: zarr stores need zarr; pip install 'perpixel[zarr]' adds it") from None
    try:
        store = zarr.open(path, mode="r")
        axes: list[str] | None = None
        if isinstance(store, zarr.Group):
            attributes = dict(store.attrs)
            scales = (attributes.get("ome", attributes).get("multiscales") or [{}])[0]
            if "datasets" in scales:
                axes = [axis["name"] if isinstance(axis, dict) else str(axis) for axis in scales.get("axes") or []] or None
                array = store[scales["datasets"][0]["path"]]
            else:
                (array,) = [found for _, found in store.arrays()]
        else:
            array = store
        axes = axes or _names(array) or _unnamed(path, array, bands)
    except (PictureError, MemoryError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise PictureError(f"{path}: no zarr array or OME-Zarr image can be read here ({why}). Name the array inside it") from None
    axes = ["c" if axis.lower() in ("c", "channel", "band") else axis.lower() for axis in axes]
    if len(axes) != array.ndim or not {"y", "x"} <= set(axes):
        raise PictureError(f"{path}: an array with axes {axes} and shape {array.shape} is not a picture; it needs y and x")
    return array, axes, {axis: n for axis, n in zip(axes, array.shape, strict=True) if axis not in ("c", "y", "x")}


def _names(array: Any) -> list[str]:
    """Names of the axes that the file tells."""
    told = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    return list(told) if told and all(told) else []


def _unnamed(path: Path, array: Any, bands: int | None) -> list[str]:
    """Axes by their number and lengths: as pictures of `bands` bands, if that is known.

    Raises:
        PictureError: no reading gives so many bands.
    """
    shape, readings = array.shape, UNNAMED.get(array.ndim, [])
    if array.ndim > 2 and shape[-1] <= BANDS_LAST < min(shape[-3:-1]):
        readings = [reading for reading in readings if reading.endswith("c")]
    elif bands is not None and array.ndim > 2 and readings:
        counts = {reading: dict(zip(reading, shape, strict=True)).get("c", 1) for reading in readings}
        fitting = [reading for reading in readings if counts[reading] == bands]
        if not fitting and bands == 3:  # one grey band does for three
            fitting = [reading for reading in readings if "c" in reading and counts[reading] == 1]
        if not fitting:
            name = f"zarr.open({str(path / array.path)!r}, mode='r+').attrs['_ARRAY_DIMENSIONS']"
            raise PictureError(
                f"{path}: the axes of its array have no names, and its shape {shape} does not tell where {bands} bands lie. Name them: "
                f'python -c "import zarr; {name} = {list(readings[-1])}" for slices, {list(readings[0])} where one axis is bands'
            )
        readings = fitting
    return list(readings[0]) if readings else []
