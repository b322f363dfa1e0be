"""Windows of TIFF: only the tiles or strips that a window touches are decoded, and the last ones are kept a while."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from perpixel.data.decoding import (
    PictureError,
    from_tiff,
    is_tiff,
    loses_description,
    tiff_alpha,
    tiff_header,
    tiff_is_cut,
    tiff_orientation,
    tiff_page,
)
from perpixel.data.geo import place_of
from perpixel.data.images import Picture, pixel_limit
from perpixel.data.windows import NO_PLACE, Window, as_window, without_nodata

SMALL = 2**22  # pixels: a striped TIFF up to this size is decoded at once, like any plain picture
KEPT_BYTES = 2**26  # decoded segments of a file kept for the next window, at least
THREADS = min(4, os.cpu_count() or 1)  # that decode at the same time
JPEG = {6, 7, 33007, 34892}  # TIFF compressions whose segments need the tables of their page


def tiff_in_parts(picture: Picture, small: bool = False) -> bool:
    """Whether windows of it can be read: its rows as they lie, its bands as they are; and are worth it: large, tiled or georeferenced.

    With `small` a striped one of any size is: what is damaged, masked or NaN in it is then known by pixel. Colours that Pillow converts
    (YCbCr) stay with Pillow there, as in training: other decoders of JPEG round otherwise.
    """
    with tifffile.TiffFile(picture.path) as tiff:
        return _in_parts(tiff_page(tiff, picture.path, picture.page, partly=True), small)


def knows_place(picture: Picture) -> bool:
    """Whether it says where it lies on Earth, or what of it is no data: Pillow would drop both."""
    with tifffile.TiffFile(picture.path) as tiff:
        page = tiff_page(tiff, picture.path, picture.page, partly=True)
        return place_of(page) != NO_PLACE or mask_of_page(picture, page) is not None


def _in_parts(page: tifffile.TiffPage, small: bool) -> bool:
    worth = page.is_tiled or page.imagelength * page.imagewidth > SMALL or place_of(page) != NO_PLACE
    if page.photometric in (tifffile.PHOTOMETRIC.YCBCR, tifffile.PHOTOMETRIC.CIELAB):
        small = False
        worth = worth and page.compression in JPEG
    return page.axes in ("YX", "YXS", "SYX") and tiff_orientation(page) == 1 and (worth or small)


def mask_of_page(picture: Picture, page: tifffile.TiffPage) -> Picture | None:
    """The transparency mask of a page: the next one of its size before another picture, else GDAL's file beside (`a.tif.msk`).

    Source: TIFF 6.0, NewSubfileType (bit 2); https://gdal.org/en/stable/drivers/raster/gtiff.html#internal-nodata-masks.
    """
    pages = page.parent.pages
    for number in range(page.index + 1, len(pages)):
        following = pages[number].aspage()
        if not (following.is_mask or following.is_reduced):
            break
        same_size = (following.imagelength, following.imagewidth) == (page.imagelength, page.imagewidth)
        if following.is_mask and not following.is_reduced and same_size:
            return Picture(picture.path, number)
    beside = mask_file(picture.path)
    return Picture(beside) if page.index == 0 and os.path.isfile(beside) else None  # the Path's own raises where the name is too long


def mask_may_be_lost(page: tifffile.TiffPage) -> bool:
    """Whether a file was cut off where the directory of the page's mask may have been: behind it and its overviews."""
    pages = page.parent.pages
    following = (pages[number].aspage() for number in range(page.index + 1, len(pages)))  # lazily: stacks are long
    return all(other.is_mask or other.is_reduced for other in following) and tiff_is_cut(page.parent)


def mask_file(path: Path) -> Path:
    """Where GDAL keeps the mask of a file that holds none."""
    return path.with_name(path.name + ".msk")


def ome_slices(path: Path) -> list[list[int]] | None:
    """Pages of each slice of an OME-TIFF that keeps its bands (axis C) on pages of their own; None for all other files.

    Raises:
        PictureError: it was cut off before the directory of its last page, so that nobody knows which pages are bands of one picture.
    """
    try:
        if not path.is_file() or not is_tiff(path):
            return None
        with tifffile.TiffFile(path) as tiff:
            if tiff_is_cut(tiff) and (tiff.is_ome or loses_description(tiff)):
                what = "the file is cut off: directories of pages are lost, and with them which pages are bands of one picture"
                raise PictureError(f"{path}: {what}. Copy or export it again, or take it away")
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
    except PictureError:
        raise
    except Exception:  # whatever is wrong with it is told when it is read
        return None


@dataclass(frozen=True)
class Cuts:
    """How a page is cut into segments."""

    segment: int  # bytes of one, decoded
    count: int
    high: int  # rows of one
    planes: int  # bands that have segments of their own
    striped: bool  # whether one is as wide as the page

    def wanted(self, rows: int) -> int:
        """Bytes of those that have to be kept for windows of `rows` rows, from left to right: of strips all that one window touches."""
        touched = (max(rows, 1) + self.high - 2) // self.high + 1
        return self.segment * min(touched * self.planes, self.count) if self.striped else 0


class Decoded:
    """Decoded segments of the pages of one picture, kept up to a common limit, and the threads that decode them."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(THREADS, "decode")
        self.pages: list[Cuts] = []
        self._kept: OrderedDict[tuple[Picture, int], np.ndarray | str] = OrderedDict()
        self._bytes, self._limit, self._lock = 0, KEPT_BYTES, threading.Lock()

    def keep(self, rows: int) -> None:
        """See `Source`."""
        self._limit = self._limit_for(rows)

    def held(self, rows: int) -> int:
        """See `Source`: what is kept, and what the threads have in hand."""
        everything = sum(page.segment * page.count for page in self.pages)
        return min(everything, self._limit_for(rows) + THREADS * max((page.segment for page in self.pages), default=0))

    def _limit_for(self, rows: int) -> int:
        return max(KEPT_BYTES, sum(page.wanted(rows) for page in self.pages))

    def get(self, picture: Picture, number: int) -> np.ndarray | str | None:
        """A segment, or why it cannot be decoded; None where it is not kept."""
        with self._lock:
            if (picture, number) in self._kept:
                self._kept.move_to_end((picture, number))
            return self._kept.get((picture, number))

    def put(self, picture: Picture, number: int, part: np.ndarray | str) -> None:
        """Keep a segment, and let go of those that were used the longest time ago."""
        with self._lock:
            self._bytes += _size(part) - _size(self._kept.pop((picture, number), ""))  # two threads may have decoded it
            self._kept[picture, number] = part
            while self._bytes > self._limit and len(self._kept) > 1:
                self._bytes -= _size(self._kept.popitem(last=False)[1])

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown()


def _size(part: np.ndarray | str) -> int:
    return 0 if isinstance(part, str) else part.nbytes


class TiffSource:
    """A TIFF page whose tiles or strips are decoded as they are needed, by a few threads.

    Segments of an ordinary file are kept up to KEPT_BYTES; of a striped one up to what a row of blocks needs (`keep`), so that no strip
    is decoded anew for each block of the row. Uncompressed rows are read from the file where they lie. What lies beyond the end of a file
    that was cut off is damage. `numbers` gives the pixels of a mask: as stored, palette indices and all.

    Args:
        picture: one that can be read in parts (`tiff_in_parts`).
        masked: what its transparency mask hides is not known; it then counts instead of alpha and of the number for "no data", as in GDAL.
        decoded: segments and threads shared with other pages.

    Raises:
        PictureError: nothing of its pixels is there, or a segment is larger than what may be decoded at once.
    """

    def __init__(self, picture: Picture, masked: bool = False, decoded: Decoded | None = None) -> None:
        self.picture = picture
        with ExitStack() as opened:
            tiff = opened.enter_context(tifffile.TiffFile(picture.path))
            self.page = page = tiff_page(tiff, picture.path, picture.page, partly=True)
            header = tiff_header(page, 1)
            self.size, self.bands, self.place = (header.height, header.width), header.bands, place_of(page)
            self.segment = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, header.height), header.width)
            self._planes = page.samplesperpixel if page.axes == "SYX" else 1
            self._across = -(-header.width // self.segment[1])
            self._down = -(-header.height // self.segment[0])
            self._seeking, self._file = threading.Lock(), opened.enter_context(picture.path.open("rb"))
            self._end = tiff.filehandle.size
            self._tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression in JPEG else {}
            self._raw = _is_raw(page) and not page.is_tiled
            if not self._raw:
                self._refuse_huge_segments()
            self._refuse_empty()
            self.decoded = opened.enter_context(closing(Decoded())) if decoded is None else decoded
            if not self._raw:
                self.decoded.pages.append(self._cuts())
            self._mask = self._masked_by(mask_of_page(picture, page) if masked else None, opened)
            self._mask_lost = masked and self._mask is None and mask_may_be_lost(page)
            self.read(0, 0, 1, 1)  # a compression nobody here can decode shows now, not as damage of every segment
            self._opened = opened.pop_all()

    def _cuts(self) -> Cuts:
        samples = 1 if self._planes > 1 else self.page.samplesperpixel
        segment = self.segment[0] * self.segment[1] * samples * np.dtype(self.page.dtype).itemsize
        return Cuts(segment, self._planes * self._down * self._across, self.segment[0], self._planes, not self.page.is_tiled)

    def _masked_by(self, mask: Picture | None, opened: ExitStack) -> "TiffSource | None":
        if mask is None:
            return None
        source = opened.enter_context(closing(TiffSource(mask, decoded=self.decoded)))
        if source.size != self.size:
            sizes = f"{source.size[0]}x{source.size[1]} pixels, and the picture {self.size[0]}x{self.size[1]}"
            raise PictureError(f"{mask}: is the mask of {self.picture}, but has {sizes}. Write it anew, or take it away")
        return source

    def keep(self, rows: int) -> None:
        """Windows of `rows` rows come from left to right: their strips are kept."""
        self.decoded.keep(rows)

    def held(self, rows: int) -> int:
        """See `Source`."""
        return self.decoded.held(rows)

    def close(self) -> None:
        """Close the file, end the threads."""
        self._opened.close()

    def numbers(self, top: int, left: int, height: int, width: int) -> Window:
        """As `read`, but as `decode(..., as_numbers=True)` gives them: of any number type, and no number stands for "no data"."""
        stored, known, damage = self._stored(top, left, height, width)
        return Window(from_tiff(self.page, stored, as_numbers=True).pixels, known, damage)

    def _stored(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray | None, dict[Any, str]]:
        return self._raw_rows(top, left, height, width) if self._raw else self._pasted(top, left, height, width)

    def read(self, top: int, left: int, height: int, width: int) -> Window:
        """See `Source`."""
        stored, known, damage = self._stored(top, left, height, width)
        if self._mask is not None:
            mask = self._mask.numbers(top, left, height, width)  # where it is damaged it has zeros
            known = _both(known, np.any(mask.pixels > 0, axis=0))
            damage |= {where: f"its mask: {why}" for where, why in mask.damage.items() if where not in damage}
        elif self._mask_lost:  # said, and the pixels are as they are: most files have no mask
            damage.setdefault((0, 0, *self.size), "the file is cut off, and with it perhaps the mask that says where it has no data")
        if self._mask is None and self.place.tags and (alpha := tiff_alpha(self.page)):  # on a map, what is transparent has no data
            known = _both(known, np.all(stored[alpha] > 0, axis=0))
        known = without_nodata(stored, known, self.place.nodata if self._mask is None else None)
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
        for (plane, (y, x)), part in zip(product(range(self._planes), places), self.decoded.pool.map(self._decoded, numbers), strict=True):
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
        part = self.decoded.get(self.picture, number)
        if part is not None:
            return part
        try:
            count = self.page.databytecounts[number]
            data = self._bytes(self.page.dataoffsets[number], count) if count else None
            decoded, _, shape = self.page.decode(data, number, _fullsize=True, **self._tables)
            part = np.full(shape[1:], self.page.nodata, self.page.dtype) if decoded is None else decoded[0]
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # decoders raise a dozen types
            if "imagecodecs" in str(error):
                raise
            part = " ".join(str(error).split())[:200] or type(error).__name__
        self.decoded.put(self.picture, number, part)
        return part

    def _raw_rows(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray | None, dict[Any, str]]:
        samples = 1 if self._planes > 1 else self.page.samplesperpixel
        dtype, high = np.dtype(self.page.dtype).newbyteorder(self.page.parent.byteorder), self.segment[0]
        pixel = samples * dtype.itemsize
        out = np.zeros((self._planes, height, width, samples), dtype.newbyteorder("="))
        known: np.ndarray | None = None
        damage: dict[Any, str] = {}
        for plane, row in product(range(self._planes), range(height)):
            strip, inside = divmod(top + row, high)
            start = self.page.dataoffsets[plane * self._down + strip]
            there = (self._end - start) // (self.page.imagewidth * pixel)  # rows of the strip, in a file that may be cut off
            try:
                if inside >= there:
                    raise EOFError(self._cut_off())
                data = self._bytes(start + (inside * self.page.imagewidth + left) * pixel, width * pixel)
                out[plane, row] = np.frombuffer(data, dtype).reshape(width, samples)
            except (OSError, EOFError) as error:  # the rest of the strip is missing, or the disk cannot read a row
                known = np.ones((height, width), bool) if known is None else known
                known[row] = False
                first, end = (strip * high + max(there, 0), (strip + 1) * high) if inside >= there else (top + row, top + row + 1)
                damage[first, 0, min(end, self.size[0]) - first, self.size[1]] = str(error)
        return (out[..., 0] if self._planes > 1 else out[0].transpose(2, 0, 1)), known, damage

    def _bytes(self, offset: int, count: int) -> bytes:
        """Bytes of the file, which several threads read; fewer than asked for are damage."""
        data = b""
        if hasattr(os, "pread"):
            while len(data) < count and (more := os.pread(self._file.fileno(), count - len(data), offset + len(data))):
                data += more
        else:  # Windows
            with self._seeking:
                self._file.seek(offset)
                data = self._file.read(count)
        if len(data) < count:
            raise EOFError(self._cut_off())
        return data

    def _cut_off(self) -> str:
        return f"the file is cut off after {self._end:,} bytes"

    def _refuse_empty(self) -> None:
        """Where a file that was cut off holds no whole row or segment of the picture."""
        row = self.page.imagewidth * (1 if self._planes > 1 else self.page.samplesperpixel) * np.dtype(self.page.dtype).itemsize
        segments = [(offset, count) for offset, count in zip(self.page.dataoffsets, self.page.databytecounts, strict=False) if count]
        if segments and all(offset + (row if self._raw else count) > self._end for offset, count in segments):
            tiff_page(self.page.parent, self.picture.path, self.picture.page)  # it says what is missing

    def _refuse_huge_segments(self) -> None:
        pixels, limit = self.segment[0] * self.segment[1], pixel_limit()
        if pixels > limit:
            raise PictureError(
                f"{self.picture}: is compressed in pieces of {self.segment[0]}x{self.segment[1]} pixels, and the limit for what is decoded "
                f"at once is {limit:,}. Write it tiled, or set PERPIXEL_MAX_PIXELS={pixels}"
            )


class BandPages:
    """An image whose bands are pages of their own, as OME-TIFF has them. They share what is kept of them, and the threads.

    Raises:
        PictureError: as `TiffSource`.
    """

    def __init__(self, pages: Sequence[Picture]) -> None:
        with ExitStack() as opened:
            self.decoded = opened.enter_context(closing(Decoded()))
            self._pages = [opened.enter_context(closing(TiffSource(page, decoded=self.decoded))) for page in pages]
            self.size, self.place, self.segment = self._pages[0].size, self._pages[0].place, self._pages[0].segment
            self.bands = sum(page.bands for page in self._pages)
            self._opened = opened.pop_all()

    def keep(self, rows: int) -> None:
        """Of every page."""
        self.decoded.keep(rows)

    def held(self, rows: int) -> int:
        """See `Source`."""
        return self.decoded.held(rows)

    def close(self) -> None:
        """Close every page, end the threads."""
        self._opened.close()

    def read(self, top: int, left: int, height: int, width: int) -> Window:
        """See `Source`."""
        parts = [page.read(top, left, height, width) for page in self._pages]
        known = [part.known for part in parts if part.known is not None]
        damage = {where: why for part in parts for where, why in part.damage.items()}
        return Window(np.concatenate([part.pixels for part in parts]), np.logical_and.reduce(known) if known else None, damage)


def _both(known: np.ndarray | None, seen: np.ndarray) -> np.ndarray | None:
    """Where both say so; None: everywhere."""
    found = seen if known is None else known & seen
    return None if found.all() else found


def _is_raw(page: tifffile.TiffPage) -> bool:
    """Whole bytes, no compression, every strip there: a pixel's place in the file can be computed."""
    whole = page.compression == 1 and page.predictor == 1 and page.fillorder == 1 and page.bitspersample in (8, 16, 32, 64)
    return whole and all(page.databytecounts) and np.dtype(page.dtype).itemsize * 8 == page.bitspersample
