"""Small pictures, encoded as WebP: photographs, labels and errors as transparent layers to lie over them, maps of one number."""

import io
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image

from perpixel.data.display import default_colors, to_display

WRONG = (213, 94, 0, 255)  # vermilion, of the palette that the colour-blind tell apart: Okabe & Ito 2008
UNKNOWN = (128, 128, 128, 200)
OKABE_ITO = [(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66), (60, 60, 60)]
Box = tuple[int, int, int, int]  # top, left, bottom, right in pixels; the latter two excluded


def shown_colors(colors: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The classes' colours; where nobody chose them, and they are few, those of Okabe and Ito, which the colour-blind tell apart."""
    own = [(int(red), int(green), int(blue)) for red, green, blue in colors]
    return OKABE_ITO[: len(own)] if own == default_colors(len(own)) and len(own) <= len(OKABE_ITO) else own


def photo(image: np.ndarray, side: int, quality: int = 76) -> bytes:
    """An image (C, H, W) of any depth, its longer side at most `side` pixels."""
    shown = Image.fromarray(to_display(image))
    height, width = _fitted(image.shape[1:], side)
    return _encoded(shown.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0), quality)


def label_layer(labels: np.ndarray, colors: Sequence[tuple[int, int, int]], side: int) -> bytes:
    """Labels (H, W) in the classes' colours, transparent where they are negative; lossless, so that a page can read classes from it."""
    small = shrunk(labels, side)
    table = np.array([*((*color, 255) for color in colors), (0, 0, 0, 0)], np.uint8)
    return _encoded(Image.fromarray(table[np.where(small < 0, len(colors), small)]))


def error_layer(truth: np.ndarray, guess: np.ndarray, side: int) -> bytes:
    """Vermilion where the prediction is wrong, grey where the truth is unknown (negative), transparent where all is well."""
    truth, guess = shrunk(truth, side), shrunk(guess, side)
    layer = np.zeros((*truth.shape, 4), np.uint8)
    layer[truth != guess] = WRONG
    layer[truth < 0] = UNKNOWN
    return _encoded(Image.fromarray(layer))


def heat(values: np.ndarray, side: int) -> bytes:
    """Values (H, W) from 0 to 1 from dark blue to yellow, by a map that the colour-blind see alike (cividis)."""
    height, width = _fitted(values.shape, side)
    small = Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    return _encoded(Image.fromarray(_cividis()[(np.asarray(small) * 255).round().clip(0, 255).astype(np.uint8)]), quality=70)


def around(box: Box, size: tuple[int, ...], least: int = 96, longest: float = 1.6) -> Box:
    """The box with as much again around it, as far as the image of `size` reaches.

    Its sides are at least `least` pixels, and none more than `longest` times the other.
    """
    height, width = (max(least, 2 * (high - low)) for low, high in ((box[0], box[2]), (box[1], box[3])))
    wanted = max(height, width / longest), max(width, height / longest)
    ends = []
    for low, high, length, whole in zip(box[:2], box[2:], wanted, size, strict=True):
        side = min(whole, round(length))
        start = min(max(0, (low + high - side) // 2), whole - side)
        ends.append((start, start + side))
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]


def cut(array: np.ndarray, box: Box) -> np.ndarray:
    """The part of an array (..., H, W) in the box."""
    return array[..., box[0] : box[2], box[1] : box[3]]


def shrunk(labels: np.ndarray, side: int) -> np.ndarray:
    """Labels (H, W) at thumbnail size, each pixel that nearest to its centre."""
    sides = zip(_fitted(labels.shape, side), labels.shape, strict=True)
    rows, columns = (((np.arange(small) + 0.5) * whole / small).astype(int) for small, whole in sides)
    return labels[rows[:, None], columns]


def _fitted(size: tuple[int, ...], side: int) -> tuple[int, int]:
    """(height, width) with the longer side at most `side`; never enlarged."""
    factor = min(1.0, side / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _encoded(image: Image.Image, quality: int | None = None) -> bytes:
    """WebP; lossless without a quality."""
    encoded = io.BytesIO()
    if quality is None:
        image.save(encoded, "WEBP", lossless=True, quality=60, method=4)
    else:
        image.save(encoded, "WEBP", quality=quality, method=4)
    return encoded.getvalue()


@cache
def _cividis() -> np.ndarray:
    """(256, 3) uint8."""
    import matplotlib

    return (matplotlib.colormaps["cividis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
