"""What is known about the values of a set of masks, and the signs that tell classes from contours and from damage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

VOID_VALUES = (255, 65535)  # what grey and palette masks mark unknown pixels with (Pascal VOC: 255)
VOID_COLOR = 0xE0E0C0  # the same in colours: index 255 of the Pascal VOC colour map
_MODE_SHARE = 0.002  # of all pixels: fewer are not taken for a class that JPEG has spread
_CANDIDATES = 512
_MODE_DISTANCE = {False: 12.0, True: 40.0}  # grey levels; Euclidean in RGB. Tried on JPEGs of quality 60 to 95 of real masks (msrc21)


@dataclass(frozen=True)
class Evidence:
    """What is known about the values of a set of masks."""

    counts: Mapping[int, int]  # value -> pixels
    rgb: bool = False  # values are r << 16 | g << 8 | b
    damaged: bool = False  # values are spread around a few strong ones, as JPEG does
    lossy: bool = False  # the files are JPEGs
    bilevel: bool = False  # the files are 1-bit
    palette: Sequence[tuple[int, int, int]] | None = None
    thin: frozenset[int] = frozenset()  # values that only form lines, such as the contours of Pascal VOC
    masks: Mapping[int, int] = field(default_factory=dict)  # value -> number of masks that hold it
    sources: Mapping[int, str] = field(default_factory=dict)  # value -> the first mask that holds it


def tally(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of one mask and their pixels."""
    if mask.dtype.kind == "u":
        pixels = np.bincount(mask.ravel())
        values = np.flatnonzero(pixels)
        return values, pixels[values]
    return np.unique(mask, return_counts=True)


def depth(mask: np.ndarray, value: int) -> tuple[int, int]:
    """Pixels of a value, and those whose 9x9 neighbours all hold it too: contours (5 pixels wide in Pascal VOC) have none."""
    inside = (mask == value).astype(np.uint8)
    deep = ndimage.minimum_filter(inside, size=9, mode="nearest")
    return int(inside.sum()), int(deep.sum())


def strong_values(counts: Mapping[int, int], rgb: bool) -> list[int]:
    """The values that flat areas hold, strongest first.

    JPEG may move a flat area by a level or two, so pixels are counted in a ball around each candidate. A flat area fills its
    ball but not the shell of twice the radius; ringing at borders, which is spread evenly, fills both.
    """
    values, pixels = _arrays(counts)
    least, radius = _MODE_SHARE * pixels.sum(), _MODE_DISTANCE[rgb]
    covered = np.zeros(len(values), bool)
    found: list[int] = []
    for index in np.argsort(-pixels, kind="stable")[:_CANDIDATES]:
        if covered[index]:
            continue
        distance = _distances(values, [int(values[index])], rgb)[:, 0]
        ball, wide = pixels[distance <= radius / 2].sum(), pixels[distance <= radius].sum()
        if ball >= least and ball >= 0.7 * wide:
            found.append(int(values[index]))
            covered |= distance <= radius
    return found


def _arrays(counts: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Values, and the pixels of each."""
    return np.fromiter(counts, np.int64, len(counts)), np.fromiter(counts.values(), np.int64, len(counts))


def _distances(values: np.ndarray, to: Sequence[int], rgb: bool) -> np.ndarray:
    """(values, to) Euclidean."""
    ends = np.asarray(to, np.int64)
    if not rgb:
        return np.abs(values[:, None].astype(np.float64) - ends)
    shifts = np.array([16, 8, 0])
    difference = (values[:, None].astype(np.int64) >> shifts & 255)[:, None] - (ends[:, None] >> shifts & 255)
    return np.sqrt((difference**2).sum(-1))


def looks_damaged(counts: Mapping[int, int], rgb: bool, lossy: bool) -> bool:
    """Whether the values are a few strong ones blurred by JPEG (or by a smooth resize), rather than classes of their own.

    Signs: many values, few of them strong, and most pixels on those: in JPEG files, where colour conversion may shift whole
    areas, beside them counts too. Classes numbered one by one fail the second, since no number stands out from its neighbours.
    """
    values, pixels = _arrays(counts)
    if len(values) < 3 or (not rgb and (values.max() > 255 or values.max() < 64 or values.min() < 0)):
        return False
    strong = strong_values(counts, rgb)
    if len(strong) < 2 or len(values) < (len(strong) + 1 if lossy else max(16, 4 * len(strong))):
        return False
    if lossy:
        return share_near(counts, strong, rgb) >= 0.6
    return bool(pixels[np.isin(values, strong)].sum() >= 0.5 * pixels.sum())


def share_near(counts: Mapping[int, int], strong: Sequence[int], rgb: bool) -> float:
    """Of all pixels, those as close to one of the strong values as JPEG leaves them."""
    values, pixels = _arrays(counts)
    near = _to_nearest(values, strong, rgb) <= _MODE_DISTANCE[rgb]
    return float(pixels[near].sum() / max(pixels.sum(), 1))


def _to_nearest(values: np.ndarray, strong: Sequence[int], rgb: bool) -> np.ndarray:
    """Distance of each value to the closest strong one; in parts, since there may be 100,000 colours."""
    parts = np.array_split(values, len(values) // 4096 + 1)
    return np.concatenate([_distances(part, strong, rgb).min(1) for part in parts])
