"""Where a picture lies on Earth: GeoTIFF tags, and rasters that rasterio (extra `[geo]`) opens.

GeoTIFF itself needs no rasterio: the tags of the picture are copied to its labels as they stand. Source: OGC GeoTIFF 1.1 (19-008r4).
"""

import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from perpixel.data.decoding import PictureError, explained
from perpixel.data.images import Picture
from perpixel.data.windows import Place, Window, as_window, segments_in, without_nodata

GEO_SUFFIXES = frozenset({".vrt", ".img"})  # mosaics of files and Erdas Imagine; GeoTIFF goes by its content
# ModelPixelScale, ModelTiepoint, ModelTransformation, GeoKeyDirectory, GeoDoubleParams, GeoAsciiParams
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
CACHE_IN_BYTES = 100_000  # a smaller GDAL_CACHEMAX is in MB (https://gdal.org/en/stable/user/configoptions.html)
NODATA_TAG = 42113  # GDAL_NODATA, a number as text


def place_of(page: tifffile.TiffPage) -> Place:
    """The geographic tags of a TIFF page, and its number for "no data"."""
    tags = [page.tags[code] for code in GEO_TAGS if code in page.tags]
    nodata: float | None = None
    if NODATA_TAG in page.tags:
        try:
            nodata = float(str(page.tags[NODATA_TAG].value).strip("\0 "))
        except ValueError:
            nodata = None  # GDAL's own reader ignores what is no number
    return Place(tuple((tag.code, int(tag.dtype), tag.count, _as_stored(page, tag), True) for tag in tags), nodata)


def _as_stored(page: tifffile.TiffPage, tag: Any) -> Any:
    """The value of a tag; of text its bytes: names of places are not always 7-bit ASCII, and tifffile writes no other text."""
    if not isinstance(tag.value, str):
        return tag.value
    file = page.parent.filehandle
    with file.lock:
        file.seek(tag.valueoffset)
        return file.read(tag.valuebytecount)


def open_raster(picture: Picture) -> "RasterSource":
    """A raster that GDAL reads. PictureError where rasterio is missing."""
    try:
        rasterio = import_module("rasterio")
    except ImportError:
        raise PictureError(f"{picture}: this kind of file needs rasterio; pip install 'perpixel[geo]' adds it") from None
    with explained(picture.path, picture.page):
        return RasterSource(picture, rasterio)


def files_of(path: Path) -> list[Path]:
    """The file, and those that it is made of (the sheets of a `.vrt`), as far as GDAL can tell."""
    if path.suffix.lower() not in GEO_SUFFIXES:
        return [path]
    try:
        with import_module("rasterio").open(path) as file:
            return sorted({path, *map(Path, file.files)})
    except (ImportError, OSError, ValueError):  # what is wrong with it is told when it is read
        return [path]


class RasterSource:
    """Windows of a raster by rasterio; its alpha band is what is not known."""

    def __init__(self, picture: Picture, rasterio: Any) -> None:
        self.picture, self._lock = picture, threading.Lock()  # a GDAL data set serves one thread at a time
        self._rasterio, self._file = rasterio, rasterio.open(picture.path)
        self.size = (self._file.height, self._file.width)
        alpha = rasterio.enums.ColorInterp.alpha
        self._indices = [number for number, kind in enumerate(self._file.colorinterp, 1) if kind != alpha]
        self.bands, self.segment = len(self._indices), self._file.block_shapes[0]
        self.place = self._tags()

    def keep(self, rows: int) -> None:
        """GDAL has a cache of its own."""

    def held(self, rows: int) -> int:
        """GDAL's cache, which is one for all files and 5 % of the machine's memory where GDAL_CACHEMAX says nothing else."""
        limit = int(self._rasterio.env.get_gdal_config("GDAL_CACHEMAX"))
        everything = self.size[0] * self.size[1] * sum(np.dtype(kind).itemsize for kind in self._file.dtypes)
        return min(limit if limit >= CACHE_IN_BYTES else limit * 2**20, everything)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, top: int, left: int, height: int, width: int) -> Window:
        """See `Source`; where a part of the window cannot be read, each of GDAL's blocks is tried by itself."""
        damage: dict[tuple[int, int, int, int], str] = {}
        with self._lock, explained(self.picture.path, None):
            try:
                pixels, seen = self._stored(top, left, height, width)
            except self._rasterio.errors.RasterioIOError:
                pixels, seen = np.zeros((self.bands, height, width), self._file.dtypes[0]), np.zeros((height, width), bool)
                for place, (y0, x0, y1, x1) in segments_in(self.size, self.segment, (top, left, height, width)):
                    part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
                    try:
                        pixels[(slice(None), *part)], seen[part] = self._stored(y0, x0, y1 - y0, x1 - x0)
                    except self._rasterio.errors.RasterioIOError as error:
                        damage[place] = " ".join(str(error).split())[:200]
        return as_window(pixels, without_nodata(pixels, None if seen.all() else seen, self.place.nodata), damage)

    def _stored(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(C, h, w), and (h, w) bool: False where alpha, mask or number say that there is no data."""
        where = self._rasterio.windows.Window(left, top, width, height)
        return self._file.read(self._indices, window=where), self._file.dataset_mask(window=where) > 0

    def _tags(self) -> Place:
        """The tags that GDAL itself would write for this place."""
        profile = {"driver": "GTiff", "height": 1, "width": 1, "count": 1, "dtype": "uint8"}
        if self._file.transform.is_identity and self._file.crs is None:
            return Place(nodata=self._file.nodata)
        with self._rasterio.MemoryFile() as memory:
            with memory.open(**profile, crs=self._file.crs, transform=self._file.transform) as small:
                small.write(np.zeros((1, 1, 1), np.uint8))
            memory.seek(0)
            with tifffile.TiffFile(memory) as tiff:
                return Place(place_of(tiff.pages.first).tags, self._file.nodata)
