"""Pictures for people: any image as RGB, labels laid over it, class colours."""

from collections.abc import Sequence

import numpy as np


def default_colors(count: int) -> list[tuple[int, int, int]]:
    """`count` class colours, far apart for neighbouring classes.

    Source: the colour map of the Pascal VOC development kit (VOClabelcolormap): the bits of the class index are dealt out in
    turn to red, green and blue, highest bit first.
    """
    colors = []
    for index in range(count):
        red, green, blue, rest = 0, 0, 0, index
        for shift in range(7, -1, -1):
            red |= (rest & 1) << shift
            green |= (rest >> 1 & 1) << shift
            blue |= (rest >> 2 & 1) << shift
            rest >>= 3
        colors.append((red, green, blue))
    return colors


def to_display(image: np.ndarray) -> np.ndarray:
    """An image of any bands and depth, as people can look at it.

    Args:
        image: (C, H, W). One band becomes grey; two become red and green; of more than three the first three are shown.
            uint8 is shown as it is; everything else is stretched so that its 1st and 99th percentile (over all bands shown, so
            that the colour balance stays) become black and white. NaN and infinity are shown black.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: if `image` is not three-dimensional.
    """
    if image.ndim != 3 or image.shape[0] == 0:
        raise ValueError(f"image has shape {image.shape}; to_display takes (bands, height, width) with at least one band")
    shown = image[:3]
    if shown.dtype != np.uint8:
        shown = _stretched(shown)
    if shown.shape[0] == 1:
        shown = np.repeat(shown, 3, axis=0)
    elif shown.shape[0] == 2:
        shown = np.concatenate([shown, np.zeros_like(shown[:1])])
    return np.ascontiguousarray(shown.transpose(1, 2, 0))


def _stretched(bands: np.ndarray) -> np.ndarray:
    """uint8, 1st to 99th percentile on 0..255."""
    values = bands.astype(np.float32)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return np.zeros(values.shape, np.uint8)
    step = max(1, finite.size // 1_000_000)  # a million values fix a percentile well enough, and large pictures stay quick
    low, high = np.percentile(finite[::step], [1, 99])
    if high <= low:  # a few bright pixels on a flat picture
        low, high = float(finite.min()), float(finite.max())
    scaled = (values - low) * (255.0 / max(high - low, 1e-20))
    return np.nan_to_num(np.clip(scaled, 0, 255), nan=0.0).round().astype(np.uint8) * np.isfinite(values)


def overlay(
    image: np.ndarray, labels: np.ndarray, colors: Sequence[tuple[int, int, int]], opacity: float = 0.5, ignore: int = 255
) -> np.ndarray:
    """The image with the colour of each pixel's class laid over it.

    Args:
        image: (C, H, W), anything `to_display` takes.
        labels: (H, W) class indices; pixels that are `ignore` show the image alone.
        colors: one RGB colour per class, 0..255.
        opacity: of the colour, 0 (only the image) to 1 (only the colour).
        ignore: the label without a class.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: if the sizes differ, a label has no colour, or the opacity is out of range.
    """
    if labels.shape != image.shape[1:]:
        raise ValueError(f"labels have shape {labels.shape}, the image {image.shape[1:]} (height, width); they must be equal")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity is {opacity}; legal is 0 to 1")
    shown = to_display(image)
    known = labels != ignore
    highest = int(labels.max(where=known, initial=0))
    if highest >= len(colors) and known.any():
        raise ValueError(f"labels hold class {highest}, but there are {len(colors)} colours; give one colour per class")
    table = np.asarray(list(colors) or [(0, 0, 0)], np.float32)
    paint = table[np.where(known, labels, 0)]
    mixed = (shown * (1 - opacity) + paint * opacity).round().astype(np.uint8)
    return np.where(known[..., None], mixed, shown)
