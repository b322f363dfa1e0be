"""Windows of TIFF: only the tiles or strips that a window touches are decoded, and the last ones are kept a while."""

import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from perpixel.data.decoding import PictureError, from_tiff, is_tiff, tiff_alpha, tiff_header, tiff_orientation, tiff_page
from perpixel.data.geo import place_of
from perpixel.data.images import Picture, pixel_limit
from perpixel.data.windows import NO_PLACE, Window, as_window, without_nodata

SMALL = 2**22  # pixels: a striped TIFF up to this size is decoded at once, like any plain picture
KEPT_BYTES = 2**26  # decoded segments kept for the next window
JPEG = {6, 7, 33007, 34892}  # TIFF compressions whose segments need the tables of their page


def tiff_in_parts(picture: Picture) -> bool:
    """Whether windows of it can be read, and are worth it: large, tiled or georeferenced, its rows as they lie, its bands as they are."""
    with tifffile.TiffFile(picture.path) as tiff:
        return _in_parts(tiff_page(tiff, picture.path, picture.page))


def _in_parts(page: tifffile.TiffPage) -> bool:
    by_pillow = page.photometric in (tifffile.PHOTOMETRIC.YCBCR, tifffile.PHOTOMETRIC.CIELAB) and page.compression not in JPEG
    legal = page.axes in ("YX", "YXS", "SYX") and tiff_orientation(page) == 1 and not by_pillow
    return legal and (page.is_tiled or page.imagelength * page.imagewidth > SMALL or place_of(page) != NO_PLACE)


def ome_slices(path: Path) -> list[list[int]] | None:
    """Pages of each slice of an OME-TIFF that keeps its bands (axis C) on pages of their own; None for all other files."""
    try:
        if not path.is_file() or not is_tiff(path):
            return None
        with tifffile.TiffFile(path) as tiff:
            if not tiff.is_ome:
                return None
            series = tiff.series[0]
            axes = series.axes[: series.axes.index("Y")]
            if any(page is not None and page.parent is not tiff for page in series.pages):
                return None  # pages of other files
            if "C" not in axes or series.axes[len(axes) :] != "YX":
                return None
            numbers = np.array([page.index for page in series.pages if page is not None]).reshape(series.shape[: len(axes)])
            return [
                [int(page) for page in pages] for pages in np.moveaxis(numbers, axes.index("C"), -1).reshape(-1, series.sizes["channel"])
            ]
    except Exception:  # whatever is wrong with it is told when it is read
        return None


class TiffSource:
    """A TIFF page whose tiles or strips are decoded as they are needed, by a few threads.

    Segments of an ordinary file are kept up to KEPT_BYTES; of a striped one up to what a row of blocks needs (`keep`), so that no strip
    is decoded anew for each block of the row. Uncompressed rows are read from the file where they lie. `numbers` gives the pixels of a
    mask: as stored, palette indices and all.
    """

    def __init__(self, picture: Picture) -> None:
        self.picture = picture
        self.page = page = tiff_page(tifffile.TiffFile(picture.path), picture.path, picture.page)
        header = tiff_header(page, 1)
        self.size, self.bands, self.place = (header.height, header.width), header.bands, place_of(page)
        self.segment = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, header.height), header.width)
        self._planes = page.samplesperpixel if page.axes == "SYX" else 1
        self._across = -(-header.width // self.segment[1])
        self._down = -(-header.height // self.segment[0])
        self._kept: OrderedDict[int, np.ndarray | str] = OrderedDict()
        self._limit, self._lock = KEPT_BYTES, threading.Lock()
        self._file = picture.path.open("rb")
        self._tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression in JPEG else {}
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "decode")
        self._raw = _is_raw(page) and not page.is_tiled
        if not self._raw:
            self._refuse_huge_segments()
            self.read(0, 0, 1, 1)  # a compression nobody here can decode shows now, not as damage of every segment

    def keep(self, rows: int) -> None:
        """Windows of `rows` rows come from left to right: their strips are kept."""
        if not self.page.is_tiled:
            row = self.page.imagewidth * self.page.samplesperpixel * np.dtype(self.page.dtype).itemsize
            self._limit = max(KEPT_BYTES, (rows + 2 * self.segment[0]) * row)

    def close(self) -> None:
        """Close the file, end the threads."""
        self._pool.shutdown()
        self._file.close()
        self.page.parent.close()

    def numbers(self, top: int, left: int, height: int, width: int) -> Window:
        """As `read`, but as `decode(..., as_numbers=True)` gives them: of any number type, and no number stands for "no data"."""
        stored, known, damage = self._stored(top, left, height, width)
        return Window(from_tiff(self.page, stored, as_numbers=True).pixels, known, damage)

    def _stored(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray | None, dict[Any, str]]:
        return self._raw_rows(top, left, height, width) if self._raw else self._pasted(top, left, height, width)

    def read(self, top: int, left: int, height: int, width: int) -> Window:
        """See `Source`."""
        stored, known, damage = self._stored(top, left, height, width)
        if self.place.tags and (alpha := tiff_alpha(self.page)):  # on a map, what is transparent has no data
            seen = np.asarray((stored[alpha] > 0).all(0))
            known = seen if known is None else known & seen
        known = without_nodata(stored, known, self.place.nodata)
        converted = from_tiff(self.page, stored, as_numbers=False)
        pixels = converted.pixels
        if converted.palette is not None:
            colours = converted.palette
            if pixels.max(initial=0) >= len(colours):
                raise PictureError(f"{self.picture}: is damaged: index {pixels.max()} in a palette of {len(colours)}. Export it again")
            pixels = colours[pixels[0]].transpose(2, 0, 1)
        elif converted.scale > 1:
            pixels = pixels * np.uint8(converted.scale)
        return as_window(pixels, known, damage)

    def _pasted(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray | None, dict[Any, str]]:
        """(bands as stored, h, w) put together from segments; where one is damaged zeros, and False in the second."""
        high, wide = self.segment
        places = list(product(range(top // high, -(-(top + height) // high)), range(left // wide, -(-(left + width) // wide))))
        numbers = [(plane * self._down + y) * self._across + x for plane in range(self._planes) for y, x in places]
        dtype = np.dtype(self.page.dtype).newbyteorder("=")
        out = np.zeros((self.page.samplesperpixel, height, width), np.uint8 if dtype.kind == "b" else dtype)
        known: np.ndarray | None = None
        damage: dict[Any, str] = {}
        for (plane, (y, x)), part in zip(product(range(self._planes), places), self._pool.map(self._decoded, numbers), strict=True):
            y0, x0 = y * high - top, x * wide - left
            rows = slice(max(y0, 0), min(y0 + high, height))
            columns = slice(max(x0, 0), min(x0 + wide, width))
            if isinstance(part, str):
                known = np.ones((height, width), bool) if known is None else known
                known[rows, columns] = False
                damage[y * high, x * wide, min(high, self.size[0] - y * high), min(wide, self.size[1] - x * wide)] = part
                continue
            seen = part[rows.start - y0 : rows.stop - y0, columns.start - x0 : columns.stop - x0]
            bands = slice(plane, plane + 1) if self._planes > 1 else slice(None)
            out[bands, rows, columns] = seen.transpose(2, 0, 1)
        return out, known, damage

    def _decoded(self, number: int) -> np.ndarray | str:
        """(h, w, samples) of a segment, from the kept ones or the file; or why it cannot be decoded."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        part: np.ndarray | str
        try:
            count = self.page.databytecounts[number]
            data = _read_at(self._file.fileno(), self.page.dataoffsets[number], count) if count else None
            decoded, _, shape = self.page.decode(data, number, _fullsize=True, **self._tables)
            part = np.full(shape[1:], self.page.nodata, self.page.dtype) if decoded is None else decoded[0]
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # decoders raise a dozen types
            if "imagecodecs" in str(error):
                raise
            part = " ".join(str(error).split())[:200] or type(error).__name__
        with self._lock:
            self._kept[number] = part
            total = sum(kept.nbytes for kept in self._kept.values() if not isinstance(kept, str))
            while total > self._limit and len(self._kept) > 1:
                dropped = self._kept.popitem(last=False)[1]
                total -= 0 if isinstance(dropped, str) else dropped.nbytes
        return part

    def _raw_rows(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, None, dict[Any, str]]:
        samples = 1 if self._planes > 1 else self.page.samplesperpixel
        dtype, rows_per_strip = np.dtype(self.page.dtype).newbyteorder(self.page.parent.byteorder), self.segment[0]
        pixel = samples * dtype.itemsize
        out = np.empty((self._planes, height, width, samples), dtype.newbyteorder("="))
        for plane, row in product(range(self._planes), range(height)):
            strip, inside = divmod(top + row, rows_per_strip)
            start = self.page.dataoffsets[plane * self._down + strip] + (inside * self.page.imagewidth + left) * pixel
            out[plane, row] = np.frombuffer(_read_at(self._file.fileno(), start, width * pixel), dtype).reshape(width, samples)
        return (out[..., 0] if self._planes > 1 else out[0].transpose(2, 0, 1)), None, {}

    def _refuse_huge_segments(self) -> None:
        pixels, limit = self.segment[0] * self.segment[1], pixel_limit()
        if pixels > limit:
            raise PictureError(
                f"{self.picture}: is compressed in pieces of {self.segment[0]}x{self.segment[1]} pixels, and the limit for what is decoded "
                f"at once is {limit:,}. Write it tiled, or set PERPIXEL_MAX_PIXELS={pixels}"
            )


class BandPages:
    """An image whose bands are pages of their own, as OME-TIFF has them."""

    def __init__(self, pages: list[TiffSource]) -> None:
        self._pages = pages
        self.size, self.place, self.segment = pages[0].size, pages[0].place, pages[0].segment
        self.bands = sum(page.bands for page in pages)

    def keep(self, rows: int) -> None:
        """As every page."""
        for page in self._pages:
            page.keep(rows)

    def close(self) -> None:
        """As every page."""
        for page in self._pages:
            page.close()

    def read(self, top: int, left: int, height: int, width: int) -> Window:
        """See `Source`."""
        parts = [page.read(top, left, height, width) for page in self._pages]
        known = [part.known for part in parts if part.known is not None]
        damage = {where: why for part in parts for where, why in part.damage.items()}
        return Window(np.concatenate([part.pixels for part in parts]), np.logical_and.reduce(known) if known else None, damage)


def _read_at(file: int, offset: int, count: int) -> bytes:
    """Bytes of a file that several threads read; fewer than asked for are damage."""
    data = b""
    while len(data) < count and (more := os.pread(file, count - len(data), offset + len(data))):
        data += more
    if len(data) < count:
        raise ValueError(f"the file ends {count - len(data)} bytes too early")
    return data


def _is_raw(page: tifffile.TiffPage) -> bool:
    """Whole bytes, no compression, every strip there: a pixel's place in the file can be computed."""
    whole = page.compression == 1 and page.predictor == 1 and page.fillorder == 1 and page.bitspersample in (8, 16, 32, 64)
    return whole and all(page.databytecounts) and np.dtype(page.dtype).itemsize * 8 == page.bitspersample
