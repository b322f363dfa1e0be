"""Colour, and grey with alpha, of more than 8 bits in PNG, PPM and JPEG 2000, of which Pillow alone keeps 8."""

import contextlib
import mmap
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

Opener = Callable[[], ImageFile.ImageFile]


def turn_upright(image: Image.Image) -> None:
    """Decode, and apply the EXIF orientation."""
    image.load()
    with contextlib.suppress(Exception):  # broken EXIF says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)


def png_depth(path: Path) -> tuple[int, int]:
    """Bit depth and colour type from the IHDR chunk (PNG, section 11.2.2); (0, 0) where the file is no PNG."""
    with path.open("rb") as file:
        start = file.read(26)
    return (start[24], start[25]) if len(start) == 26 and start.startswith(b"\x89PNG\r\n\x1a\n") else (0, 0)


def deep_bands(image: ImageFile.ImageFile, path: Path) -> int:
    """Bands, without alpha, of a file of which Pillow, which has opened it, would keep 8 bits; 0: it keeps all."""
    if image.mode not in ("RGB", "RGBA", "LA"):
        return 0
    bits = color = 0
    if image.format == "PNG":
        bits, color = png_depth(path)
    elif image.format == "PPM":
        bits = ppm_maximum(image).bit_length()
    elif image.format == "JPEG2000":
        bits = _jpeg2000_depth(path)
    return 0 if bits <= 8 else 1 if color == 4 or image.mode == "LA" else 3


def read_deep(opener: Opener, path: Path) -> np.ndarray:
    """(3, H, W) uint16, of grey with alpha (1, H, W), on the full range; upright.

    Raises:
        ImportError: JPEG 2000 without imagecodecs.
    """
    with opener() as image:
        if image.format == "PPM":
            return _ppm16(image)
    return _png16(opener, png_depth(path)[1]) if image.format == "PNG" else _jpeg2000_16(path)


def ppm_maximum(image: Image.Image) -> int:
    """The value that stands for white in a PPM or PGM file (Netpbm's maxval), which Pillow scales to 255 or 65535; 0: as it is stored."""
    tile = image.tile[0] if isinstance(image, ImageFile.ImageFile) and image.format == "PPM" and image.tile else None
    return tile.args[1] if tile is not None and tile.codec_name in ("ppm", "ppm_plain") and isinstance(tile.args, tuple) else 0


def _png16(opener: Opener, color: int) -> np.ndarray:
    if color == 4:  # the two bytes of grey and the two of alpha, taken for four bands
        four = _unpacked(opener, "RGBA", "RGBA")
        high, low = four[..., :1], four[..., 1:2]
    else:  # the high bytes, or, told that they come first, the low ones
        mode = "RGB" if color == 2 else "RGBA"
        high, low = (_unpacked(opener, mode, f"{mode};16{order}")[..., :3] for order in "BL")
    return np.ascontiguousarray((high << 8 | low).transpose(2, 0, 1))


def _unpacked(opener: Opener, mode: str, raw: str) -> np.ndarray:
    """(H, W, bands) uint16: a PNG whose bytes Pillow takes for those of another of its raw modes; upright."""
    with opener() as image:
        image._mode = mode
        image.tile = [tile._replace(args=raw) for tile in image.tile]
        turn_upright(image)
        return np.asarray(image).astype(np.uint16)


def _ppm16(image: ImageFile.ImageFile) -> np.ndarray:
    """Taken for grey, three times as wide, of which Pillow keeps all bits."""
    width, height = image.size
    image._mode, image._size = "I", (3 * width, height)
    image.tile = [tile._replace(extents=(0, 0, 3 * width, height)) for tile in image.tile]
    return np.ascontiguousarray(np.asarray(image).astype(np.uint16).reshape(height, width, 3).transpose(2, 0, 1))


def _jpeg2000_depth(path: Path) -> int:
    """Bits of the first band, from the SIZ marker behind the start of the code stream (ISO/IEC 15444-1, annex A.5.1)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(b"\xff\x4f\xff\x51")
        return (content[start + 42] & 127) + 1 if 0 <= start < len(content) - 42 else 0


def _jpeg2000_16(path: Path) -> np.ndarray:
    pixels: np.ndarray = import_module("imagecodecs").jpeg2k_decode(path.read_bytes())  # (H, W, bands)
    colors = 3 if pixels.shape[2] >= 3 else 1
    shifted = pixels[..., :colors] << (16 - _jpeg2000_depth(path))  # as Pillow does with grey
    return np.ascontiguousarray(shifted.transpose(2, 0, 1))
