"""The pixels of one file, as they are stored: tifffile for TIFF, Pillow for all other formats.

What the numbers mean (an image's palette colours, a mask's palette indices) is decided in images.py and masks.py.
"""

import errno
import logging
import stat
import struct
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image, ImageFile, UnidentifiedImageError

from perpixel.data.sixteen_bits import deep_bands, png_depth, ppm_maximum, read_deep, turn_upright

# Only formats that hold pixels: Pillow's others include EPS, which would start Ghostscript.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ALPHA = (1, 2)  # TIFF 6.0, tag ExtraSamples: associated and unassociated alpha
# TIFF 6.0, sections 2 and 8: bytes of each tag type; size, depth, compression, colour, strips, tiles, palette, alpha, number type
_TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_PIXEL_TAGS = {*range(256, 260), 262, 273, 274, *range(277, 280), 284, 317, 320, *range(322, 326), 338, 339, 347}

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # damage is reported by our errors, not twice on stderr


class PictureError(ValueError):
    """A file that cannot be read as a picture; the message names it, says why and what to do."""


@dataclass(frozen=True)
class Stored:
    """Pixels as the file holds them, upright, without alpha."""

    pixels: np.ndarray  # (C, H, W)
    palette: np.ndarray | None = None  # (256, 3) uint8 when the pixels are palette indices; 16-bit palettes are longer
    scale: int = 1  # factor to the full range of uint8: 255 for 1 bit, 85 for 2, 17 for 4


@dataclass(frozen=True)
class Header:
    """What a file says about itself before its pixels are decoded."""

    height: int
    width: int
    bands: int  # without alpha; 3 for palettes and CMYK
    dtype: str
    mode: str
    pages: int


def decode(path: Path, page: int | None, limit: int, as_numbers: bool = False) -> Stored:
    """The pixels of a file, or of one page of a stack.

    With `as_numbers` a TIFF whose 0 is white (MINISWHITE) is not inverted, and a PGM not scaled to the full range: in a mask 0 is
    a class, not a brightness.

    Raises:
        PictureError: missing, forbidden, empty, not a picture, damaged, or more than `limit` pixels.
    """
    with explained(path, page):
        if is_tiff(path):
            return _decode_tiff(path, page, limit, as_numbers)
        _refuse_page(path, page)
        with _open_pillow(path, limit) as image:
            if deep_bands(image, path):
                return Stored(_read_deep(path, limit))
            if getattr(image, "is_animated", False) and image.format != "MPO":
                warnings.warn(f"{path}: holds an animation; only its first picture is used", stacklevel=4)
            maximum = ppm_maximum(image)
            packed = image.format == "PNG" and image.mode == "L"
            stored = _from_pillow(image, {2: 85, 4: 17}.get(png_depth(path)[0], 1) if packed else 1)
            return _unscaled(stored, maximum) if as_numbers and maximum else stored


def _read_deep(path: Path, limit: int) -> np.ndarray:
    try:
        return read_deep(lambda: _open_pillow(path, limit), path)
    except ImportError:
        what = "colour of more than 8 bits in JPEG 2000 needs imagecodecs; pip install 'perpixel[tiff]' adds it"
        raise PictureError(f"{path}: {what}") from None


def _unscaled(stored: Stored, maximum: int) -> Stored:
    """The numbers of a PGM mask, which Pillow has scaled so that `maximum` is white."""
    full = np.iinfo(stored.pixels.dtype).max
    return Stored((stored.pixels * (maximum / full)).round().astype(stored.pixels.dtype))


def read_header(path: Path, page: int | None, limit: int) -> Header:
    """Size, bands and type, without decoding pixels. Raises PictureError as `decode` does, where the header shows it."""
    with explained(path, page):
        if is_tiff(path):
            with tifffile.TiffFile(path) as tiff:
                return tiff_header(tiff_page(tiff, path, page), len(tiff.pages))
        _refuse_page(path, page)
        with _open_pillow(path, limit) as image:
            height, width, mode = image.height, image.width, image.mode
            if image.format in ("JPEG", "MPO", "WEBP") and image.getexif().get(0x0112, 1) in (5, 6, 7, 8):
                height, width = width, height
            pages = int(getattr(image, "n_frames", 1)) if getattr(image, "is_animated", False) else 1
            if bands := deep_bands(image, path):
                return Header(height, width, bands, "uint16", "LA;16" if bands == 1 else "RGB;16", pages)
            wide = mode == "I" and image.format in ("PNG", "PPM")
        dtype = "bool" if mode == "1" else "uint16" if wide or mode.startswith("I;16") else "float32" if mode in ("I", "F") else "uint8"
        bands = 1 if mode in ("1", "L", "LA", "La", "I", "F") or mode.startswith("I;16") else 3
        return Header(height, width, bands, dtype, mode, pages)


def read_file_palette(path: Path, page: int | None, limit: int) -> np.ndarray | None:
    """(n, 3) uint8 colours of a palette file, else None."""
    with explained(path, page):
        if is_tiff(path):
            with tifffile.TiffFile(path) as tiff:
                return _tiff_palette(tiff_page(tiff, path, page))
        with _open_pillow(path, limit) as image:
            return _pillow_palette(image)


def stack_pages(path: Path) -> list[int]:
    """The pages of a TIFF stack: [] where the file is no TIFF, is damaged, or holds one picture.

    Reduced copies (pyramids) and transparency masks are left out; pages that differ in size are no stack, which a warning says.
    A stack that was cut off has one page more than can be found, so that reading that one names the damage instead of losing
    pages silently.
    """
    try:
        if not path.is_file() or not is_tiff(path):
            return []
        with tifffile.TiffFile(path) as tiff:
            return _stack(tiff, path)
    except Exception:  # whatever is wrong with it is told when it is read
        return []


@contextmanager
def explained(path: Path, page: int | None) -> Iterator[None]:
    """Every failure as an PictureError that names the file. Decoders raise a dozen types, so all are caught."""
    name = f"{path}" if page is None else f"{path}[{page}]"
    try:
        yield
    except (PictureError, MemoryError):
        raise
    except FileNotFoundError:
        raise PictureError(f"{name}: there is no such file") from None
    except PermissionError:
        raise PictureError(f"{name}: no permission to read it; change its mode (chmod u+r) or its owner") from None
    except UnidentifiedImageError:
        raise PictureError(f"{name}: {_foreign(path)}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE):
            raise PictureError(f"{name}: the disk cannot read it ({error.strerror})") from error
        what = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"{name}: is damaged or cut off ({what[:200]}). Copy or export it again, or take it away") from error


def _foreign(path: Path) -> str:
    start = path.read_bytes()[:12]
    return f"is not a picture perpixel can read (it begins with {start!r}). Legal: {', '.join(FORMATS)}. Export it again, or take it away"


def is_tiff(path: Path) -> bool:
    """By content, not by name. Also the place where missing, empty and strange files are refused, before a decoder sees them."""
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise PictureError(f"{path}: is a folder, not a file")
    if not stat.S_ISREG(found.st_mode):
        raise PictureError(f"{path}: is not a regular file")
    if found.st_size == 0:
        raise PictureError(f"{path}: is empty (0 bytes). Copy or export it again, or take it away")
    with path.open("rb") as file:
        return file.read(4) in _TIFF_STARTS


def _refuse_page(path: Path, page: int | None) -> None:
    if page is not None:
        raise PictureError(f"{path}[{page}]: only TIFF files have pages; name the file without a page")


def _refuse_bomb(path: Path, height: int, width: int, limit: int) -> None:
    if height * width > limit:
        size = f"{height}x{width} pixels (height x width) are {height * width:,}"
        allow = f"PERPIXEL_MAX_PIXELS={height * width}"
        raise PictureError(f"{path}: {size}; the limit of {limit:,} guards against decompression bombs. To allow it, set {allow}")


def _open_pillow(path: Path, limit: int) -> ImageFile.ImageFile:
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit is lower and process-wide; it is only ever raised, never switched off
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limit)
    try:
        image = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        allow = "To allow it, set PERPIXEL_MAX_PIXELS to its number of pixels"
        size = f"more than the limit of {limit:,} pixels, which guards against decompression bombs ({error})"
        raise PictureError(f"{path}: {size}. {allow}") from None
    _refuse_bomb(path, image.height, image.width, limit)
    return image


def _pillow_palette(image: Image.Image) -> np.ndarray | None:
    if image.mode not in ("P", "PA"):
        return None
    flat = np.asarray(image.getpalette("RGB"), np.uint8)
    palette = np.zeros((256, 3), np.uint8)  # files may leave out the unused end
    palette[: flat.size // 3] = flat.reshape(-1, 3)
    return palette


def _from_pillow(image: Image.Image, scale: int) -> Stored:
    turn_upright(image)
    palette = _pillow_palette(image)
    mode = image.mode
    if mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa"):
        image = image.convert("RGB")
    elif mode == "La":
        image = image.convert("LA")
    pixels = np.asarray(image)
    if mode == "1":
        return Stored(pixels[None].astype(np.uint8), scale=255)
    if mode in ("LA", "La", "PA"):
        pixels = pixels[..., 0]
    if pixels.ndim == 3:
        return Stored(np.ascontiguousarray(pixels[..., :3].transpose(2, 0, 1)))
    if mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits in an older Pillow's 32
        pixels = pixels.astype(np.uint16)
    return Stored(_native(pixels // np.uint8(scale) if scale > 1 else pixels)[None], palette, scale)


def _native(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _whole(page: Any) -> tifffile.TiffPage:
    """tifffile gives light frames for some pages of a stack; their key frame knows the rest."""
    return page if isinstance(page, tifffile.TiffPage) else page.aspage()


def tiff_page(tiff: tifffile.TiffFile, path: Path, page: int | None, partly: bool = False) -> tifffile.TiffPage:
    """A page whose pixels are all there; with `partly` some may lie beyond the end of a file that was cut off.

    Raises:
        PictureError: no such page, or the file is cut off.
    """
    count = len(tiff.pages)
    index = 0 if page is None else page
    if not 0 <= index < count:
        cut = "; the file is cut off" if tiff_is_cut(tiff) else ""
        raise PictureError(f"{path}[{index}]: there is no such page, only 0 to {count - 1}{cut}. Copy or export it again")
    found = _whole(tiff.pages[index])
    end = _end_of_tags(tiff, found)
    if not partly:
        end = max(end, *(o + n for o, n in zip(found.dataoffsets, found.databytecounts, strict=False)), 0)
    if end > tiff.filehandle.size:
        size = f"{tiff.filehandle.size:,} bytes long, but its content reaches to byte {end:,}"
        raise PictureError(f"{path}[{index}]: the file is cut off: it is {size}. Copy or export it again, or take it away")
    return found


def loses_description(tiff: tifffile.TiffFile) -> bool:
    """Whether the ImageDescription of the first page, which may be that of OME, lies beyond the end of the file."""
    return _end_of_tags(tiff, _whole(tiff.pages[0]), {270}) > tiff.filehandle.size


def _end_of_tags(tiff: tifffile.TiffFile, page: tifffile.TiffPage, codes: Collection[int] = _PIXEL_TAGS) -> int:
    """Where the values of some tags end, by default of those that describe pixels.

    tifffile takes a default where one lies beyond the end of the file.
    """
    form, handle, end = tiff.tiff, tiff.filehandle, 0
    handle.seek(page.offset)
    (count,) = struct.unpack(form.tagnoformat, handle.read(form.tagnosize))
    entries = handle.read(count * form.tagsize)
    for at in range(0, len(entries) - form.tagsize + 1, form.tagsize):
        code, kind = struct.unpack_from(form.tagformat1, entries, at)
        number, raw = struct.unpack_from(form.tagformat2, entries, at + struct.calcsize(form.tagformat1))
        size = number * _TAG_BYTES.get(kind, 1)
        if code in codes and size > len(raw):
            end = max(end, int(struct.unpack(form.offsetformat, raw)[0]) + size)
    return end


def tiff_is_cut(tiff: tifffile.TiffFile) -> bool:
    """Whether the chain of pages points on beyond the last page found (TIFF 6.0, section 2): tifffile only logs that."""
    form, handle = tiff.tiff, tiff.filehandle
    handle.seek(tiff.pages[len(tiff.pages) - 1].offset)
    try:
        (tags,) = struct.unpack(form.tagnoformat, handle.read(form.tagnosize))
        handle.seek(tags * form.tagsize, 1)
        (following,) = struct.unpack(form.offsetformat, handle.read(form.offsetsize))
    except struct.error:
        return True
    return bool(following != 0)


def _stack(tiff: tifffile.TiffFile, path: Path) -> list[int]:
    pages = [_whole(page) for page in tiff.pages]
    kept = [i for i, page in enumerate(pages) if not (page.is_reduced or page.is_mask)]
    shapes = dict.fromkeys("x".join(map(str, pages[i].shape)) for i in kept)
    if len(shapes) > 1:
        if not _is_pyramid(tiff):
            sizes = ", ".join(list(shapes)[:4]) + (", ..." if len(shapes) > 4 else "")
            way = "Write pages of other sizes to files of their own"
            warnings.warn(f"{path}: its {len(kept)} pages differ in shape ({sizes}); only the first is used. {way}", stacklevel=5)
        return []
    if tiff_is_cut(tiff):
        kept.append(len(pages))
    return kept if len(kept) > 1 else []


def _is_pyramid(tiff: tifffile.TiffFile) -> bool:
    """Whether a vendor's format, such as Aperio's, makes pages the levels of one slide without marking them as reduced."""
    try:
        return tiff.series[0].is_pyramidal
    except Exception:  # tifffile gives up on some descriptions in as many ways; the pages can be read all the same
        return False


def _tiff_palette(page: tifffile.TiffPage) -> np.ndarray | None:
    if page.photometric != tifffile.PHOTOMETRIC.PALETTE or page.colormap is None:
        return None
    return np.ascontiguousarray((np.asarray(page.colormap).T >> 8).astype(np.uint8))  # 16 bits a colour, TIFF 6.0 section 5


def tiff_alpha(page: tifffile.TiffPage) -> list[int]:
    """Bands that are transparency."""
    first = page.samplesperpixel - len(page.extrasamples)
    return [first + i for i, kind in enumerate(page.extrasamples) if int(kind) in _ALPHA]


def tiff_header(page: tifffile.TiffPage, pages: int) -> Header:
    height, width = page.imagelength, page.imagewidth
    if tiff_orientation(page) >= 5:
        height, width = width, height
    bands = page.samplesperpixel - len(tiff_alpha(page))
    if page.photometric in (tifffile.PHOTOMETRIC.PALETTE, tifffile.PHOTOMETRIC.SEPARATED):
        bands = 3
    kind = str(page.dtype)
    return Header(height, width, bands, kind if kind in ("bool", "uint8", "uint16") else "float32", "", pages)


def tiff_orientation(page: tifffile.TiffPage) -> int:
    tag = page.tags.get(274)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def _decode_tiff(path: Path, page: int | None, limit: int, as_numbers: bool) -> Stored:
    with tifffile.TiffFile(path) as tiff:
        found = tiff_page(tiff, path, page)
        _refuse_bomb(path, found.imagelength, found.imagewidth, limit)
        if page is None and (stack := _stack(tiff, path)):
            warnings.warn(f"{path}: holds {len(stack)} pages; only the first is used", stacklevel=4)
        if found.photometric in (tifffile.PHOTOMETRIC.YCBCR, tifffile.PHOTOMETRIC.CIELAB):
            return _tiff_by_pillow(path, found.index, limit)
        try:
            pixels = found.asarray()
        except (ValueError, ImportError) as error:
            if not lacks_codec(error):
                raise
            try:
                return _uninverted(_tiff_by_pillow(path, found.index, limit), found, as_numbers)
            except OSError:
                compression = getattr(found.compression, "name", found.compression)
                way = "pip install 'perpixel[tiff]' adds it"
                raise PictureError(f"{path}: its compression ({compression}) needs imagecodecs; {way}") from None
        return from_tiff(found, _by_bands(found, pixels, path), as_numbers)


def lacks_codec(error: Exception) -> bool:
    """Whether tifffile says that it would need imagecodecs."""
    return isinstance(error, ImportError) or "imagecodecs" in str(error)


def _by_bands(page: tifffile.TiffPage, pixels: np.ndarray, path: Path) -> np.ndarray:
    """(C, H, W), native byte order, upright."""
    if page.axes == "YX":
        pixels = pixels[None]
    elif page.axes == "YXS":
        pixels = pixels.transpose(2, 0, 1)
    elif page.axes != "SYX":
        raise PictureError(f"{path}: a page with axes {page.axes} is not a picture; write one picture per page")
    orientation = tiff_orientation(page)  # TIFF 6.0: which corner row 0 and column 0 are
    if orientation >= 5:
        pixels = pixels.transpose(0, 2, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    return _native(pixels)


def from_tiff(page: tifffile.TiffPage, pixels: np.ndarray, as_numbers: bool) -> Stored:
    pixels = np.delete(pixels, tiff_alpha(page), axis=0) if tiff_alpha(page) else pixels
    if np.iscomplexobj(pixels):
        raise ValueError("complex numbers are no picture; write magnitude and phase as bands")
    bits = int(np.min(page.bitspersample))
    scale = {1: 255, 2: 85, 4: 17}.get(bits, 1)
    pixels = pixels.astype(np.uint8) if pixels.dtype == bool else pixels
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and pixels.dtype.kind == "u" and not as_numbers:
        pixels = pixels.dtype.type(2**bits - 1) - pixels
    if page.photometric == tifffile.PHOTOMETRIC.SEPARATED and pixels.shape[0] >= 4:
        full = float(np.iinfo(pixels.dtype).max)
        light = 1 - pixels[:4].astype(np.float32) / full
        pixels = (light[:3] * light[3] * full).round().astype(pixels.dtype)
    palette = _tiff_palette(page)
    return Stored(pixels, palette, 1 if palette is not None else scale)


def _uninverted(stored: Stored, page: tifffile.TiffPage, as_numbers: bool) -> Stored:
    """Pillow inverts MINISWHITE of up to 8 bits as it reads."""
    bits = int(np.min(page.bitspersample))
    if not as_numbers or page.photometric != tifffile.PHOTOMETRIC.MINISWHITE or bits > 8:
        return stored
    return Stored(stored.pixels.dtype.type(1 if bits == 1 else 255) - stored.pixels, stored.palette, stored.scale)


def _tiff_by_pillow(path: Path, page: int, limit: int) -> Stored:
    """For compressions that tifffile needs imagecodecs for, and colour spaces that Pillow knows how to convert."""
    with _open_pillow(path, limit) as image:
        image.seek(page)
        return _from_pillow(image, 1)
