"""Cut and stitch, exactly. Source: overlap-tile strategy, Ronneberger et al. 2015, arXiv:1505.04597, Fig. 2."""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from perpixel.models.model import InputGeometry, SegmentationModel


def mirror_pad(image: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """An image continued beyond its border by mirroring it there; the edge pixel itself is not repeated.

    Args:
        image: (..., H, W), any dtype.
        top, bottom, left, right: pixels to add, each >= 0 and as many as wanted: a border wider than the image mirrors to and fro,
            and an image one pixel wide repeats that pixel.

    Returns:
        (..., top + H + bottom, left + W + right).

    Raises:
        ValueError: if `image` has no pixels or a pad is negative.

    Source: arXiv:1505.04597, Fig. 2, "missing data is extrapolated by mirroring".
    """
    if image.ndim < 2 or 0 in image.shape[-2:]:
        raise ValueError(f"image has shape {tuple(image.shape)}; mirroring needs (..., H, W) with at least one pixel")
    if min(top, bottom, left, right) < 0:
        raise ValueError(f"pads are {top}, {bottom}, {left}, {right} (top, bottom, left, right); none may be negative")
    height, width = image.shape[-2:]
    return _window(image, -top, -left, top + height + bottom, left + width + right)


def predict_whole(model: SegmentationModel, image: Tensor) -> Tensor:
    """Logits of a whole image in one pass: padded by mirroring to a legal size, and cropped back.

    Args:
        model: in eval mode, on the device of `image`.
        image: (C, H, W) float, normalised as in training; any size from 1x1.

    Returns:
        (K, H, W) logits, dtype and device of the image; K classes.

    Raises:
        ValueError: if `image` is not three-dimensional or not float.
    """
    height, width = _check(image)
    sides = [_labelled(model.geometry, side) for side in (height, width)]
    logits = _predict_windows(model, image, [(0, 0)], sides[0], sides[1])[0, :, :height, :width]
    return logits.to(image.dtype, copy=True, memory_format=torch.contiguous_format)


def predict_tiled(model: SegmentationModel, image: Tensor, tile: int, overlap: int, batch: int = 1) -> Tensor:
    """Logits of a whole image, predicted tile by tile.

    Windows start at multiples of the model's geometry, so that its pooling sees the same phase in each of them. A model with a
    margin therefore gives exactly what one pass over the whole image gives. A model without one pads inside, and sees less near
    the border of a window: there neighbouring windows are blended by weights that fall towards the border.

    Args:
        model: in eval mode, on the device of `image`.
        image: (C, H, W) float, normalised as in training; any size from 1x1.
        tile: side of the labelled window, in pixels; enlarged to the next legal one that is `overlap` and a step wide.
        overlap: pixels shared by neighbouring windows at least, 0 <= overlap < tile.
        batch: windows that run through the model at a time.

    Returns:
        (K, H, W) logits, dtype and device of the image; K classes.

    Raises:
        ValueError: if `image` is not three-dimensional or not float, or `tile`, `overlap` or `batch` is out of range.

    Source: overlap-tile strategy, Ronneberger et al. 2015, arXiv:1505.04597, Fig. 2.
    """
    height, width = _check(image)
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap} and tile {tile} pixels; need 0 <= overlap < tile")
    if batch < 1:
        raise ValueError(f"batch is {batch}; at least 1 window runs at a time")
    # Windows move by whole cells, so they are at least one larger than their overlap; and never need to be larger than the image.
    cell = model.geometry.cell or model.geometry.multiple
    wanted = max(tile, overlap + cell)
    window_height, window_width = (_labelled(model.geometry, min(wanted, side)) for side in (height, width))
    tops = _origins(height, window_height, overlap, cell)
    lefts = _origins(width, window_width, overlap, cell)
    if len(tops) == len(lefts) == 1:
        return predict_whole(model, image)
    ramps = [_ramp(side, overlap).to(image) for side in (window_height, window_width)]
    weight = ramps[0][:, None] * ramps[1]
    total = image.new_zeros(model.classes, height, width)
    corners = list(product(tops, lefts))
    for first in range(0, len(corners), batch):
        some = corners[first : first + batch]
        logits = _predict_windows(model, image, some, window_height, window_width)
        for (top, left), part in zip(some, logits, strict=True):
            inside = total[:, top : top + window_height, left : left + window_width]
            shown = (slice(inside.shape[1]), slice(inside.shape[2]))
            inside.addcmul_(part[(slice(None), *shown)].to(total.dtype), weight[shown])
    # The weights of all windows at a pixel are the product of their sums along each axis.
    total /= _cover(tops, ramps[0], height)[:, None]
    total /= _cover(lefts, ramps[1], width)
    return total


def _check(image: Tensor) -> tuple[int, int]:
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; prediction takes one image (C, H, W) with at least one pixel")
    if not image.is_floating_point():
        raise ValueError(f"image is {image.dtype}; prediction takes a float image, normalised as in training")
    return image.shape[1], image.shape[2]


def _labelled(geometry: InputGeometry, side: int) -> int:
    """The smallest window side that the model can label and that is at least `side`."""
    return geometry.fit(side + 2 * geometry.margin) - 2 * geometry.margin


def _origins(side: int, window: int, overlap: int, cell: int) -> list[int]:
    """Where windows start: multiples of `cell` that cover `side` pixels with at least `overlap` in common."""
    step = max((window - overlap) // cell * cell, cell)  # a window as large as the side does not step at all
    last = max(-(-(side - window) // cell) * cell, 0)
    return [*range(0, last, step), last]


def _ramp(side: int, overlap: int) -> Tensor:
    """Weights along one side of a window: sin^2, rising over `overlap` pixels at each end; two of them add up to 1."""
    distance = torch.arange(side, dtype=torch.float64) + 0.5
    distance = torch.minimum(distance, side - distance)
    if overlap == 0:
        return torch.ones_like(distance)
    return torch.sin(torch.pi / 2 * (distance / overlap).clamp(max=1)).square()


def _cover(origins: list[int], ramp: Tensor, side: int) -> Tensor:
    """The sum of the windows' weights at each pixel of a side."""
    cover = ramp.new_zeros(side)
    for origin in origins:
        part = cover[origin : origin + len(ramp)]
        part += ramp[: len(part)]
    return cover


def _predict_windows(model: SegmentationModel, image: Tensor, corners: Sequence[tuple[int, int]], height: int, width: int) -> Tensor:
    """(N, K, height, width) logits of the windows whose labelled parts start at `corners`."""
    margin = model.geometry.margin
    windows = [_window(image, top - margin, left - margin, height + 2 * margin, width + 2 * margin) for top, left in corners]
    with torch.inference_mode():
        logits: Tensor = model(torch.stack(windows).contiguous(memory_format=torch.channels_last))
    return logits


def _window(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """A window of the endlessly mirrored image; a view where it lies inside."""
    rows, columns = image.shape[-2:]
    if top >= 0 and top + height <= rows:
        image = image[..., top : top + height, :]
    else:
        image = image.index_select(-2, _mirrored(top, height, rows).to(image.device))
    if left >= 0 and left + width <= columns:
        return image[..., left : left + width]
    return image.index_select(-1, _mirrored(left, width, columns).to(image.device))


def _mirrored(start: int, count: int, side: int) -> Tensor:
    """Pixel indices of `count` pixels from `start` on a side that is mirrored without end."""
    period = max(2 * side - 2, 1)
    position = torch.arange(start, start + count).remainder(period)
    return torch.minimum(position, period - position)
