"""Pictures on disk: find them, look at their headers, read them."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perpixel.data.decoding import PictureError, decode, read_header, stack_pages
from perpixel.data.display import default_colors, overlay, to_display
from perpixel.data.writing import replacing, write_labels, write_rgb

__all__ = [
    "FULL_SCALE",
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "Picture",
    "PictureError",
    "PictureInfo",
    "as_picture",
    "default_colors",
    "expand",
    "find_pictures",
    "inspect",
    "overlay",
    "pixel_limit",
    "read_image",
    "replacing",
    "to_display",
    "write_labels",
    "write_rgb",
]
FULL_SCALE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}  # the stored value that stands for 1.0
MAX_PIXELS = 2**28  # 16384 x 16384: above ordinary scans and orthophotos, below what fills a machine
IMAGE_SUFFIXES: frozenset[str] = frozenset(
    {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".pbm", ".pgm", ".ppm", ".pnm"}
)


@dataclass(frozen=True)
class Picture:
    """One picture: a file, or one page of a stack."""

    path: Path
    page: int | None = None

    @property
    def name(self) -> str:
        """`im1`; `train-volume_0003` for page 3."""
        return self.path.stem if self.page is None else f"{self.path.stem}_{self.page:04d}"

    def __str__(self) -> str:
        return str(self.path) if self.page is None else f"{self.path}[{self.page}]"


@dataclass(frozen=True)
class PictureInfo:
    """What the header says."""

    height: int
    width: int
    bands: int  # as read_image gives them
    dtype: str  # "uint8", "uint16", "float32" or "bool" (1-bit; read as uint8)
    mode: str  # Pillow's name (L, RGB, P, 1, I;16, CMYK, ...); "" for TIFF
    pages: int


def pixel_limit(max_pixels: int | None = None) -> int:
    """How many pixels a picture may have: the argument, else the environment variable PERPIXEL_MAX_PIXELS, else MAX_PIXELS."""
    if max_pixels is not None:
        return max_pixels
    text = os.environ.get("PERPIXEL_MAX_PIXELS", "").strip()
    if not text:
        return MAX_PIXELS
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"PERPIXEL_MAX_PIXELS is {text!r}; legal is a whole number of pixels above 0, such as {MAX_PIXELS}")
    return int(text)


def as_picture(picture: Picture | Path) -> Picture:
    """A path alone stands for its (first) picture."""
    return picture if isinstance(picture, Picture) else Picture(Path(picture))


def inspect(picture: Picture | Path) -> PictureInfo:
    """What the header says, without decoding pixels.

    Raises:
        PictureError (a ValueError): if the file is missing, forbidden, empty, not a picture, or too large.
    """
    picture = as_picture(picture)
    header = read_header(picture.path, picture.page, pixel_limit())
    return PictureInfo(header.height, header.width, header.bands, header.dtype, header.mode, header.pages)


def expand(path: Path) -> list[Picture]:
    """The pages of a TIFF stack (pages of equal size), else the file itself as one picture.

    Never raises for a damaged file; reading it will, so that one bad file does not stop a search among thousands.
    """
    return [Picture(path, page) for page in stack_pages(path)] or [Picture(path)]


def find_pictures(inputs: Sequence[str | Path]) -> list[Picture]:
    """The pictures behind files, folders, globs and stacks, each once.

    Args:
        inputs: files (whatever their suffix), folders (their files with IMAGE_SUFFIXES by name, not those of folders below,
            nothing hidden), patterns such as `scans/*.tif`. Stacks are expanded to their pages.

    Raises:
        ValueError: if an input is missing, cannot be listed, or holds no picture.
    """
    paths: dict[Path, None] = {}
    for given in inputs:
        try:
            found = _paths_behind(given)
        except OSError as error:
            way = "change its mode (chmod u+rx) or its owner"
            raise ValueError(f"{given}: cannot be read ({error.strerror}); {way}") from error
        if not found:
            below = "; folders below are not searched: name them, or a pattern such as '**/*.png'" if Path(given).is_dir() else ""
            raise ValueError(f"{given}: no pictures here. Looked for files ending in {', '.join(sorted(IMAGE_SUFFIXES))}{below}")
        paths.update(dict.fromkeys(found))
    if not paths:
        raise ValueError("no input given; name picture files, folders or patterns such as 'scans/*.tif'")
    return [picture for path in paths for picture in expand(path)]


def _paths_behind(given: str | Path) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        return sorted(inside for inside in path.iterdir() if _is_image_name(inside) and inside.is_file())
    if path.exists():
        return [path]
    if any(sign in str(given) for sign in "*?["):
        return [found for found in sorted(map(Path, glob.glob(str(given), recursive=True))) if _is_image_name(found) and found.is_file()]
    raise ValueError(f"{given}: there is no such file or folder")


def _is_image_name(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def read_image(picture: Picture | Path, max_pixels: int | None = None) -> np.ndarray:
    """An image as the models take it, before normalisation.

    Upright (EXIF and TIFF orientation are applied). Palettes, CMYK and YCbCr become RGB; 1, 2 and 4 bits become uint8 on the
    full range 0..255; alpha is dropped, whatever it hides. 8 and 16 bits stay what they are, PPM and PGM of other maxima are
    scaled to these; other number types become float32. TIFF may have any number of bands, interleaved or planar. Of an
    animation, or a stack given without a page, the first picture is read and a warning names the file.

    Args:
        picture: a file or one page of a stack.
        max_pixels: refuse larger pictures before decoding; None: the environment's PERPIXEL_MAX_PIXELS, else MAX_PIXELS.

    Returns:
        (C, H, W) uint8, uint16 or float32, C-contiguous and writable.

    Raises:
        PictureError (a ValueError): if the file is missing, forbidden, empty, not a picture, damaged, too large, or holds
            NaN or infinite values; the message names it and says what to do.
    """
    picture = as_picture(picture)
    stored = decode(picture.path, picture.page, pixel_limit(max_pixels))
    if stored.palette is not None:
        image = _painted(picture, stored.pixels, stored.palette)
    elif stored.scale > 1:
        image = stored.pixels * np.uint8(stored.scale)
    else:
        image = stored.pixels
    if image.dtype not in (np.uint8, np.uint16):
        image = image.astype(np.float32)
        if bad := int(image.size - np.isfinite(image).sum()):
            share = f"{bad} of {image.size} values are NaN or infinite"
            raise PictureError(f"{picture}: {share}. Fill them with a number, or take the file away")
    return np.require(image, requirements=["C", "W"])


def _painted(picture: Picture, indices: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(1, H, W) palette indices -> (3, H, W) colours."""
    if indices.max(initial=0) >= len(palette):
        raise PictureError(f"{picture}: is damaged: index {indices.max()} in a palette of {len(palette)}. Export it again")
    return palette[indices[0]].transpose(2, 0, 1)
